"""Post-local SGD: fused steps, then every worker alone, with averages between; against a reference, bit for bit."""

import logging
from functools import partial

import numpy as np
import pytest
from reference import RULES, LocalReference, ReferenceEngine, assert_same_bits

import extrapcomm as xc
from extrapcomm import _core

torch = pytest.importorskip("torch")

LENGTHS = [2500, 33, 5000]  # straddle the shards of up to 8 workers
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
CASES = RULES["sgd"].cases


class Pair:
    """An optimizer beside its reference, fed with the same random gradients."""

    def __init__(self, world, local_steps, start=0, dtype="float32", extrapolation="none", **hyper):
        self.world, self.local_steps, self.start, self.dtype = world, local_steps, start, dtype
        self.random = np.random.default_rng(7)
        self.weights = self.values()
        self.options = {"local_steps": local_steps, "start": start, "extrapolation": extrapolation}
        self.hyper = {"lr": 0.1, **hyper}
        self.params = self.parameters()
        self.opt = xc.PostLocalSGD(self.params, **self.hyper, **self.options, world=world)
        self.shared = ReferenceEngine(
            self.weights, world.K, dtype=dtype, extrapolation=extrapolation, **self.hyper
        )
        self.local, self.steps, self.in_round = None, 0, 0

    def values(self):
        return [self.random.normal(size=n).astype(self.dtype) for n in LENGTHS]

    def parameters(self):
        return [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in self.weights]

    def gradients(self, absent=()):
        """For every worker and layer; none where `absent` has (worker, layer)."""
        each = [self.values() for _ in range(self.world.K)]
        return [[None if (k, i) in absent else g for i, g in enumerate(of)] for k, of in enumerate(each)]

    def bring(self, opt, params, grads):
        """Gives this rank's workers their gradients."""
        for v in range(self.world.workers):
            with opt.worker(v):
                for param, g in zip(params, grads[self.first + v], strict=True):
                    param.grad = None if g is None else torch.from_numpy(g.copy())

    @property
    def first(self):
        return self.world.rank * self.world.workers

    def step(self, absent=(), divisor=1.0):
        grads = self.gradients(absent)
        self.bring(self.opt, self.params, grads)
        self.opt.step()
        self.follow(grads, divisor)

    def follow(self, grads, divisor=1.0):
        """The reference's step."""
        self.steps += 1
        if self.steps <= self.start:
            self.shared.step(grads, divisor)
            return
        self.local = self.local or LocalReference(self.shared)
        self.local.step(grads, divisor)
        self.in_round += 1
        if self.in_round == self.local_steps:
            self.average()

    def average(self):
        self.local.average()
        self.in_round = 0

    def compare(self):
        for i, w in enumerate(self.shared.w):
            assert_same_bits(self.opt.master(i).numpy(), w, "master weights")
        for v in range(self.world.workers):
            k = self.first + v
            wanted = self.local.w[k] if self.local else self.shared.x[k]
            with self.opt.worker(v):
                for param, w in zip(self.params, wanted, strict=True):
                    assert_same_bits(param.detach().numpy(), w, f"worker {k}")


@pytest.fixture
def pair():
    """pair(world, local_steps, start, ...) -> Pair; its optimizer is closed after the test."""
    made = []

    def make(*args, **options):
        made.append(Pair(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.opt.close()


def is_odd(world):
    return world.rank == world.size - 1


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_workers_step_alone_and_the_average_is_the_tree_mean(team, pair, case, local_steps):
    p = pair(team, local_steps, start=2, **CASES[case])
    for step in range(2 * local_steps + 3):
        assert p.opt.local == (step >= 2)
        p.step()
        p.compare()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averages_published_past_the_cache_are_the_same(team, pair, dtype, monkeypatch):
    monkeypatch.setattr("extrapcomm.bound.Core", partial(_core.Engine, streaming=True))
    p = pair(team, 2, start=1, dtype=dtype, momentum=0.9)
    for step in range(5):
        p.step({(k, 1) for k in range(team.K)} if step > 2 else ())
        p.compare()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("extrapolation", ["local", "global"])
def test_local_phase_begins_at_the_undisplaced_weights(team, pair, extrapolation, dtype):
    p = pair(team, 2, start=3, dtype=dtype, extrapolation=extrapolation, momentum=0.9, nesterov=True)
    for _ in range(8):
        p.step()
        p.compare()


def test_fused_steps_are_those_of_extrap_sgd(team, pair):
    p = pair(team, 4, start=3, extrapolation="local", momentum=0.9)
    other = p.parameters()
    opt = xc.ExtrapSGD(other, **MOMENTUM, world=team)
    for _ in range(3):
        grads = p.gradients()
        for optimizer, params in ((p.opt, p.params), (opt, other)):
            p.bring(optimizer, params, grads)
            optimizer.step()
        for mine, wanted in zip(p.params, other, strict=True):
            assert torch.equal(mine, wanted)
    opt.close()


def test_one_worker_alone_takes_the_steps_of_sgd(virtual, pair):
    p = pair(virtual(1), 2, momentum=0.9, nesterov=True, weight_decay=0.01)
    sgd = ReferenceEngine(p.weights, 1, dtype="float32", **p.hyper)
    for _ in range(5):
        grads = p.gradients()
        p.bring(p.opt, p.params, grads)
        p.opt.step()
        sgd.step(grads)
        for param, w in zip(p.params, sgd.w, strict=True):
            assert_same_bits(param.detach().numpy(), w)


@pytest.mark.parametrize("case", ["plain", "dampened", "nesterov"])
def test_averaging_every_step_follows_sgd_as_the_mean_buffer_does(team, pair, case):
    p = pair(team, 1, dtype="float64", **CASES[case])
    sgd = ReferenceEngine(p.weights, team.K, **p.hyper)
    for _ in range(6):
        grads = p.gradients()
        p.bring(p.opt, p.params, grads)
        p.opt.step()
        sgd.step(grads)
    state = p.opt.state_dict()["state"]
    for i, (w, slots) in enumerate(zip(sgd.w, sgd.slots, strict=True)):
        np.testing.assert_allclose(p.opt.master(i), w, rtol=1e-12, atol=1e-12)
        if "momentum" in p.hyper:
            np.testing.assert_allclose(state[i]["momentum_buffer"], slots[0], rtol=1e-12, atol=1e-12)


def test_worker_without_a_gradient_keeps_its_weights_and_untouched_layers_keep_their_bits(team, pair):
    p = pair(team, 2, momentum=0.9, dampening=0.5)
    everywhere = {(k, 1) for k in range(team.K)}
    for absent in (everywhere | {(0, 0)}, everywhere, {(0, 0)}, {(team.K - 1, 2)}, set(), everywhere):
        p.step(absent)
        p.compare()


def test_micro_batches_divide_each_workers_own_gradient(team, pair):
    p = pair(team, 2, momentum=0.9)
    for _ in range(3):
        for _ in range(2):
            with p.opt.no_sync():
                for v in range(team.workers):
                    with p.opt.worker(v):
                        pass
        p.step(divisor=3.0)
        p.compare()


def test_new_learning_rate_is_in_force_at_the_next_local_step(team, pair):
    p = pair(team, 2)
    for lr in (0.1, 0.5, 0.25):
        p.opt.param_groups[0]["lr"] = p.shared.hyper["lr"] = lr
        p.step()
        p.compare()


def test_between_averages_everything_that_is_saved_is_the_last_average(team, pair):
    p = pair(team, 3, start=1, momentum=0.9)
    for _ in range(6):
        p.step()
    saved = p.opt.state_dict()
    for i, (w, slots) in enumerate(zip(p.shared.w, p.shared.slots, strict=True)):
        assert_same_bits(saved["extrapcomm"]["master"][i].numpy(), w)
        assert_same_bits(saved["state"][i]["momentum_buffer"].numpy(), slots[0])
        assert saved["state"][i]["step"] == 4
    with p.opt.master_weights():
        for param, w in zip(p.params, p.shared.w, strict=True):
            assert_same_bits(param.detach().numpy(), w)
    p.compare()
    copies = p.parameters()
    torchs = torch.optim.SGD(copies, **MOMENTUM)
    torchs.load_state_dict(saved)
    assert torch.equal(torchs.state[copies[0]]["momentum_buffer"], saved["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoint_of_an_average_resumes_from_the_mean_of_the_momenta(team, pair, momentum):
    p = pair(team, 2, start=1, momentum=momentum)
    for _ in range(5):
        p.step()
    resumed = pair(team, 2, start=1, momentum=momentum)
    resumed.opt.load_state_dict(p.opt.state_dict())
    assert resumed.opt.local
    p.local = LocalReference(p.shared)
    for _ in range(3):
        grads = p.gradients()
        resumed.bring(resumed.opt, resumed.params, grads)
        resumed.opt.step()
        p.follow(grads)
    resumed.local, resumed.shared = p.local, p.shared
    resumed.compare()


def test_loading_ends_the_local_phase_and_an_early_checkpoint_is_before_it(team, pair):
    p = pair(team, 3, start=2, momentum=0.9)
    p.step()
    early = p.opt.state_dict()
    shared = [list(p.shared.w), list(p.shared.slots), list(p.shared.t)]
    for _ in range(3):
        p.step()
    p.opt.load_state_dict(early)
    assert not p.opt.local
    p.shared.w, p.shared.slots, p.shared.t = shared
    p.local, p.steps, p.in_round = None, 1, 0
    for _ in range(5):
        p.step()
        p.compare()


def test_averaging_now_begins_a_new_round_and_closing_leaves_its_weights(team, pair):
    p = pair(team, 3, start=1, momentum=0.9)
    p.opt.average()  # nothing to average yet
    for _ in range(3):
        p.step()
    p.opt.average()
    p.average()
    p.compare()
    for _ in range(4):
        p.step()
        p.compare()
    p.opt.average()
    p.average()
    p.opt.close()
    for param, w in zip(p.params, p.shared.w, strict=True):
        assert_same_bits(param.detach().numpy(), w)
    with pytest.raises(xc.UsageError, match="closed"):
        p.opt.average()


def test_adopted_weights_are_everybodys_and_momenta_stay(team, pair):
    p = pair(team, 3, momentum=0.9)
    for _ in range(2):
        p.step()
    with torch.no_grad():
        for param in p.params:
            param.fill_(0.5)
    p.opt.adopt()
    for i in range(len(LENGTHS)):
        half = np.full(LENGTHS[i], 0.5, np.float32)
        p.shared.w[i] = half
        for w in p.local.w:
            w[i] = half
    p.in_round = 0
    p.local.begin_round()
    for _ in range(3):
        p.step()
        p.compare()


def test_group_added_in_the_local_phase_trains_with_the_averaged_others(team, pair):
    p = pair(team, 3, momentum=0.9)
    for _ in range(2):
        p.step()
    p.average()
    new = torch.nn.Parameter(torch.ones(40))
    p.opt.add_param_group({"params": [new], "lr": 0.5})
    p.local = LocalReference(p.shared)
    p.compare()
    assert p.opt.local
    for _ in range(3):
        grads = p.gradients()
        for v in range(team.workers):
            with p.opt.worker(v):
                new.grad = torch.ones(40)
        p.bring(p.opt, p.params, grads)
        p.opt.step()
        p.follow(grads)
    p.compare()
    assert torch.allclose(new.detach(), 1 - 0.5 * torch.full((40,), 1 + 1.9 + 2.71))


# -- Mistakes ----------------------------------------------------------------------------------------------------

WRONG = {
    "local_steps must be": {"local_steps": 0},
    "local_steps must be a whole": {"local_steps": 2.5},
    "start must be": {"start": -1},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_options_of_one_rank_are_an_error_of_all(world, text):
    options = {"local_steps": 2, "start": 1, **(WRONG[text] if is_odd(world) else {})}
    with pytest.raises(xc.UsageError, match=text):
        xc.PostLocalSGD(torch.nn.Linear(2, 2).parameters(), **options, world=world)


def test_short_parameters_are_refused(world):
    dtype = torch.bfloat16 if is_odd(world) else torch.float32
    with pytest.raises(
        xc.UsageError, match="'0.0' is bfloat16: a worker alone has no float32 master weights"
    ):
        xc.PostLocalSGD(torch.nn.Linear(2, 2).to(dtype).parameters(), local_steps=2, start=1, world=world)


def test_ranks_that_would_switch_at_different_times_are_a_mismatch(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(xc.MismatchError, match=r"PostLocalSGD\(local_steps=2, start=[01]\), rank"):
        xc.PostLocalSGD(
            torch.nn.Linear(2, 2).parameters(), local_steps=2, start=int(is_odd(world)), world=world
        )


def spoil_rate(p):
    p.opt.param_groups[0]["lr"] = float("nan")


def mend_rate(p):
    p.opt.param_groups[0]["lr"] = 0.1


def spoil_weights(p):
    p.mine = p.params[2].data
    p.params[2].data = torch.zeros_like(p.params[2])


def mend_weights(p):
    p.params[2].data = p.mine


SPOILERS = {
    "lr must be finite": (spoil_rate, mend_rate),
    "max_grad_norm": (
        lambda p: setattr(p.opt, "max_grad_norm", 1.0),
        lambda p: setattr(p.opt, "max_grad_norm", None),
    ),
    "skip_nonfinite": (
        lambda p: setattr(p.opt, "skip_nonfinite", True),
        lambda p: setattr(p.opt, "skip_nonfinite", False),
    ),
    "written or replaced outside": (spoil_weights, mend_weights),
}


@pytest.mark.parametrize("spoiled_at", [0, 1, 3])
@pytest.mark.parametrize("text", SPOILERS)
def test_mistake_of_one_rank_between_averages_is_an_error_of_all_and_can_be_mended(
    world, pair, text, spoiled_at
):
    """The rank that errs waits for the others' averaging; nobody has lost or repeated a step."""
    p = pair(world, 4, start=1, momentum=0.9)
    p.step()
    spoil, mend = SPOILERS[text]
    raised = 0
    for step in range(4):
        grads = p.gradients()
        p.bring(p.opt, p.params, grads)
        mistaken = is_odd(world) and step == spoiled_at
        if mistaken:
            spoil(p)
        told = mistaken or (not is_odd(world) and step == (0 if spoiled_at == 0 else 3))
        if told:
            with pytest.raises(xc.UsageError, match=text):
                p.opt.step()
            raised += 1
        if mistaken:
            mend(p)
        p.opt.step()
        p.follow(grads)
    assert raised == 1
    p.compare()


def test_different_numbers_of_local_steps_are_a_mismatch_and_touch_nothing(world, pair):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    p = pair(world, 3, momentum=0.9)
    p.step()
    x = [param.detach().clone() for param in p.params]
    p.opt.local_steps = 3 if is_odd(world) else 2
    text = "the number of local steps since the last averaging is 2 on rank 0 but 3 on rank"
    grads = p.gradients()
    p.bring(p.opt, p.params, grads)
    if is_odd(world):
        p.opt.step()
        x = [param.detach().clone() for param in p.params]
    with pytest.raises(xc.MismatchError, match=text):
        p.opt.step()
    assert all(torch.equal(param, before) for param, before in zip(p.params, x, strict=True))
    with pytest.raises(xc.MismatchError, match="since the last averaging is 1 on rank 0 but 2 on rank"):
        p.opt.average()
    p.opt.adopt()
    p.opt.average()


def test_averaging_and_stepping_at_the_same_time_are_a_mismatch(world, pair):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    p = pair(world, 2)
    p.step()
    p.bring(p.opt, p.params, p.gradients())
    with pytest.raises(xc.MismatchError, match="rank 0 is in a local step that averages"):
        p.opt.average() if is_odd(world) else p.opt.step()


def test_different_rates_are_noticed_at_the_averaging(world, pair):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    p = pair(world, 2)
    p.opt.param_groups[0]["lr"] = 0.1 + is_odd(world)
    p.bring(p.opt, p.params, p.gradients())
    p.opt.step()
    with pytest.raises(xc.MismatchError, match=r"lr of parameter group 0 is 0\.1"):
        p.opt.step()


def test_rank_that_leaves_between_averages_is_named_at_the_averaging(world, pair):
    if world.size == 1:
        pytest.skip("needs a rank that leaves")
    p = pair(world, 2)
    p.step()
    if world.rank == 0:
        p.opt.close()
        return
    with pytest.raises(xc.PeerError, match="rank 0") as caught:
        p.opt.average()
    assert caught.value.kind == "left"
    with p.opt.master_weights():  # the last average: nothing was touched
        assert_same_bits(p.params[0].detach().numpy(), p.weights[0])


def test_loss_scales_are_refused_before_the_switch_too(world, pair):
    p = pair(world, 2, start=5)
    scaler = xc.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.params[0].sum()).backward()
    with pytest.raises(xc.UsageError, match="GradScaler"):
        scaler.step(p.opt)


def test_clipping_each_workers_own_gradient_is_no_mistake(world, pair, caplog):
    p = pair(world, 2, start=1)
    with caplog.at_level(logging.WARNING, "extrapcomm"):
        for _ in range(3):
            p.opt.zero_grad()
            sum(param.square().sum() for param in p.params).backward()
            torch.nn.utils.clip_grad_norm_(p.params, 1.0)
            p.opt.step()
    assert not caplog.records


@pytest.mark.parametrize("how", ["part", "failure"])
def test_loading_between_averagings_keeps_what_a_worker_has_learnt(world, how):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    opt = xc.PostLocalSGD(model.parameters(), lr=0.1, local_steps=16, start=0, world=world)
    opt.attach(model)
    begin = model.bias.detach().clone()

    def steps(number):
        for _ in range(number):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()

    steps(5)
    if how == "part":
        model.load_state_dict({"weight": torch.zeros(2, 2)}, strict=False)
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(7)})
    steps(1)
    torch.testing.assert_close(model.bias.detach(), begin - 0.1 * 6)
    opt.close()
