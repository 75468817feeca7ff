"""Sums that travel during backward give the bits of those that travel in the step, whatever happens in between."""

import contextlib
import logging

import numpy as np
import pytest
from conftest import COMM, LIMITS
from reference import assert_same_bits

import extrapcomm as xc

torch = pytest.importorskip("torch")

WIDTHS = (12, 40, 33, 50, 7)
BUCKET = 700  # elements: several layers and several buckets
KINDS = {
    "sgd": (xc.SGD, {"lr": 0.05}),
    "momentum": (xc.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (xc.Adam, {"lr": 0.01}),
    "lamb": (xc.LAMB, {"lr": 0.01}),
    "local": (xc.ExtrapSGD, {"lr": 0.05, "momentum": 0.9, "inner_lr": "lr"}),
    "global": (xc.SGD, {"lr": 0.05, "extrapolation": "global", "inner_lr": "lr"}),
    "preconditioned": (xc.ExtrapAdam, {"lr": 0.01}),
    "filter": (xc.SGD, {"lr": 0.05, "extrapolation": "gaussian", "inner_lr": 0.01}),
    "clipped": (xc.ExtrapSGD, {"lr": 0.05, "max_grad_norm": 0.1}),
    "noise": (xc.ExtrapSGD, {"lr": 0.05, "inner_lr": "noise"}),
}


@pytest.fixture(scope="module", params=[1, 2], ids=lambda n: f"teams of {n}")
def teams(request):
    """teams(V): all ranks with V workers each, so many ranks in a team."""
    made = {}

    def make(workers):
        if workers not in made:
            made[workers] = xc.World(COMM, workers, workers_per_team=request.param * workers, **LIMITS)
        return made[workers]

    yield make
    for world in made.values():
        world.close()


class Run:
    """A model that is trained with an optimizer, the same whichever way its sums travel."""

    def __init__(self, world, overlap, kind="momentum", tied=False, gain=None, **options):
        torch.manual_seed(7)
        pairs = zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairs)
        self.square = torch.nn.Linear(7, 7)
        self.spare = torch.nn.Linear(7, 7)
        if tied:
            self.spare.weight = self.square.weight
        self.model = torch.nn.ModuleList([*self.layers, self.square, self.spare])
        make, defaults = KINDS[kind]
        if gain is not None:
            options["gain"] = gain()
        self.world, self.seen = world, []
        self.opt = make(
            self.model.parameters(), world=world, overlap=overlap, **{"bucket": BUCKET} | defaults | options
        )

    def loss(self, number, spare=False):
        """Of the bound worker's own batch."""
        worker = self.world.rank * self.world.workers + self.opt._binding.bound
        x = torch.from_numpy(np.random.default_rng([number, worker]).normal(size=(5, 12)).astype("f"))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.square(x)
        return (self.spare(torch.tanh(x)) if spare else x).square().mean()

    def backward(self, number, **options):
        """With all of this rank's workers."""
        for v in range(self.world.workers):
            with self.opt.worker(v):
                self.loss(number, **options).backward()

    def step(self):
        self.opt.step()
        self.look()

    def look(self):
        self.seen += [self.opt.master(i).numpy() for i in range(len(self.opt._binding.params))]
        for v in range(self.world.workers):
            with self.opt.worker(v):
                self.seen += [param.detach().numpy().copy() for param in self.model.parameters()]


def same(world, scenario, **options):
    """Collective: runs scenario(run) with and without overlap and compares all weights after every step."""
    seen = []
    for overlap in (False, True):
        run = Run(world, overlap, **options)
        scenario(run)
        run.opt.close()
        seen.append(run.seen)
    assert len(seen[0]) == len(seen[1]) > 0
    for plain, overlapped in zip(*seen, strict=True):
        assert_same_bits(overlapped, plain, "weights")


def train(run, steps=3):
    for number in range(steps):
        run.opt.zero_grad()
        run.backward(number)
        run.step()


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_gives_the_same_bits(teams, kind):
    if kind != "noise" or teams(1).K > 1:  # one worker alone has none
        same(teams(1), train, kind=kind)


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
def test_every_manner_of_gradients_gives_the_same_bits(teams, gradients):
    same(teams(1), train, gradients=gradients)


@pytest.mark.parametrize("bucket", [1, 3000, 10**9])
def test_the_size_of_buckets_changes_no_bit(teams, bucket):
    same(teams(1), train, bucket=bucket)


def test_several_workers_of_a_rank_give_the_same_bits(teams):
    same(teams(2), train)
    same(teams(2), train, kind="local")


@pytest.mark.parametrize("lag", [0, 1])
def test_adascale_gives_the_same_bits(teams, lag):
    if teams(1).K > 1:  # alone it compares micro-batches
        same(teams(1), train, gain=lambda: xc.AdaScale(scale=2.0, lag=lag))


def test_tied_weights_give_the_same_bits(teams):
    def scenario(run):
        for number in range(3):
            run.opt.zero_grad()
            run.backward(number, spare=True)
            run.step()

    same(teams(1), scenario, tied=True)


def test_parameters_that_come_and_go_give_the_same_bits(teams):
    """The spare layer is used by no rank, by all, by some, and by no rank again."""

    def scenario(run):
        uses = [lambda rank: False, lambda rank: True, lambda rank: rank == 0, lambda rank: False]
        for number in range(12):
            run.opt.zero_grad()
            run.backward(number, spare=uses[number % 4](run.world.rank))
            run.step()

    same(teams(1), scenario)
    same(teams(2), scenario)


def test_micro_batches_give_the_same_bits(teams):
    def scenario(run):
        for number in range(3):
            run.opt.zero_grad()
            with run.opt.no_sync():
                run.backward(10 * number)
            run.backward(10 * number + 1)
            run.step()

    same(teams(1), scenario)
    same(teams(2), scenario)


def test_a_second_backward_gives_the_same_bits(teams):
    """On all ranks, and on one alone."""

    def scenario(run):
        for number in range(4):
            run.opt.zero_grad()
            run.backward(10 * number)
            if number % 2 or run.world.rank == 0:
                run.backward(10 * number + 1)
            run.step()

    same(teams(1), scenario)
    same(teams(2), scenario)


def test_gradients_that_pile_up_over_steps_give_the_same_bits(teams):
    def scenario(run):
        for number in range(3):
            run.backward(number)
            run.step()

    same(teams(1), scenario)


@pytest.mark.parametrize("gradients", ["copy", "view"])
def test_changing_gradients_by_hand_gives_the_same_bits(teams, gradients):
    def scale(run):
        for param in run.layers[2].parameters():
            param.grad.mul_(0.5)

    def clip(run):
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)

    def replace(run):
        run.layers[1].weight.grad = torch.ones_like(run.layers[1].weight)

    def drop(run):
        run.layers[3].bias.grad = None

    def start_again(run):
        run.opt.zero_grad()
        run.backward(99)

    def zero(run):
        run.opt.zero_grad(set_to_none=False)

    def scenario(run):
        for number, change in enumerate([scale, clip, replace, drop, start_again, zero, drop]):
            run.opt.zero_grad()
            run.backward(number)
            if number % 2 or run.world.rank == run.world.size - 1:
                change(run)
            run.step()

    same(teams(1), scenario, gradients=gradients)


def test_skipped_steps_give_the_same_bits(teams):
    def scenario(run):
        for number in range(4):
            run.opt.zero_grad()
            run.backward(number)
            if number == 1 and run.world.rank == 0:
                run.square.weight.grad[0, 0] = float("inf")
            run.step()
            assert run.opt.skipped == (number == 1)

    same(teams(1), scenario, skip_nonfinite=True)


def test_a_step_without_any_gradient_gives_the_same_bits(teams):
    def scenario(run):
        train(run, 2)
        run.opt.zero_grad()
        run.step()
        train(run, 2)

    same(teams(1), scenario)


def test_an_error_before_the_step_leaves_the_next_one_right(teams):
    def scenario(run):
        run.backward(0)
        if run.world.rank == 0:
            with torch.no_grad():
                run.square.weight.add_(1.0)
        with pytest.raises(xc.UsageError, match="written or replaced"):
            run.opt.step()
        run.opt.adopt()
        run.opt.zero_grad()
        run.backward(1)
        run.step()

    same(teams(1), scenario)


def test_groups_that_are_added_give_the_same_bits(teams):
    def scenario(run):
        run.backward(0)
        more = torch.nn.Parameter(torch.ones(9))
        run.opt.add_param_group({"params": [more]})
        for number in range(2):
            run.opt.zero_grad()
            for v in range(run.world.workers):
                with run.opt.worker(v):
                    (run.loss(number) * more.sum()).backward()
            run.step()

    same(teams(1), scenario)


def test_sums_are_complete_before_the_step_when_backward_is_long(teams):
    """The last layers are finished long before the first ones."""
    world = teams(1)
    run = Run(world, True)
    for _ in range(2):
        run.opt.zero_grad()
        for layer in (run.square, *reversed(run.layers)):
            sum(param.square().sum() for param in layer.parameters()).backward()
            COMM.Barrier()
        run.opt.step()
    if len(world.teams) == 1:
        assert run.opt.overlapped_part == 0.0
    elif world.rank == world.size - 1:
        assert run.opt.overlapped_part > 0.0  # it owns the last layers
    run.opt.close()


def test_closing_between_backward_and_step_hangs_nobody(teams):
    for _ in range(3):
        run = Run(teams(1), True)
        run.backward(0)
        run.opt.close()
    train(Run(teams(1), True))


def test_a_rank_that_leaves_after_backward_is_an_error_elsewhere(teams):
    world = teams(1)
    run = Run(world, True)
    run.backward(0)
    if world.rank == world.size - 1:
        run.opt.close()
    else:
        with pytest.raises(xc.PeerError) as caught:
            run.opt.step()
        assert caught.value.rank == world.size - 1
    COMM.Barrier()  # who closes now leaves, too
    run.opt.close()


def test_one_team_says_once_that_there_is_nothing_to_send(virtual, caplog):
    with caplog.at_level(logging.WARNING, logger="extrapcomm"):
        run = Run(virtual(1), True)
    train(run)
    run.opt.close()
    assert [record.message for record in caplog.records if "overlap" in record.message] == [
        "overlap=True has nothing to send during backward: all ranks share memory"
    ]


@pytest.mark.parametrize("bucket", [0, 1.5, True])
def test_a_bucket_that_is_no_number_of_elements_is_refused(world, bucket):
    with pytest.raises(xc.UsageError, match="bucket must be a whole number"):
        xc.SGD(torch.nn.Linear(2, 2).parameters(), world=world, bucket=bucket)


ORDERS = ["out, in", "in, out", "out, in, out", "out, in by one rank", "out, in the first alone"]


@pytest.mark.parametrize("bucket", [16, 1 << 18])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_within_no_sync_after_others_went_are_not_lost(teams, order, bucket):
    """A bucket does not wait for a layer that had no gradient in the last step; it may come within no_sync() yet."""
    world, moved = teams(1), {}
    for overlap in (False, True):
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(2)]
        opt = xc.SGD(params, lr=1.0, world=world, overlap=overlap, bucket=bucket, accumulation="sum")
        a, b = params
        for _ in range(2):
            opt.zero_grad()
            b.sum().backward()
            opt.step()
        opt.zero_grad()
        for part in order.split(", "):
            within = part.startswith("in")
            late = (3 * a).sum() + (0 if "alone" in part else b.sum())
            if "one rank" in part and world.rank:
                late = b.sum()
            with opt.no_sync() if within else contextlib.nullcontext():
                (late if within else b.sum()).backward()
        opt.step()
        moved[overlap] = [p.detach().clone() for p in params]
        opt.close()
    for found, wanted in zip(moved[True], moved[False], strict=True):
        torch.testing.assert_close(found, wanted)
    assert moved[True][0].any()
