"""max_grad_norm, skip_nonfinite and gradient accumulation: agreed by all workers, inside the step."""

import numpy as np
import pytest
from reference import ReferenceEngine, assert_same_bits, clip_for, grad_norm

import extrapcomm as xc

LENGTHS = (1500, 1, 0, 1024, 33)
KINDS = ["none", "local", "global"]


class Twins:
    """An engine with random gradients beside the reference, which takes the engine's norm once that is checked."""

    def __init__(self, world, extrapolation="none", tile=512, rule="sgd", **options):
        self.world, self.random = world, np.random.default_rng(7)
        initial = self.draw()
        hyper = {"rule": rule, "lr": 0.1, "weight_decay": 0.01, "extrapolation": extrapolation}
        hyper |= {"momentum": 0.9} if rule == "sgd" else {}
        self.engine = xc.Engine(world, [w.copy() for w in initial], tile=tile, **hyper, **options)
        self.twin = ReferenceEngine(initial, world.K, dtype="float32", **hyper)

    def draw(self, scale=1.0):
        return [(scale * self.random.normal(size=n)).astype("float32") for n in LENGTHS]

    def step(self, scale=1.0, divisor=1.0, poison=None):
        grads = [self.draw(scale) for _ in range(self.world.K)]
        if poison is not None:
            grads[-1][3][500] = poison
        first = self.world.rank * self.world.workers
        for worker, mine in zip(self.engine.workers, grads[first:], strict=False):
            for view, g in zip(worker.grads, mine, strict=True):
                view[:] = g
        self.engine.step(divisor=divisor)
        if self.engine.skipped:
            return
        clip = 1.0
        if self.engine.grad_norm is not None:
            assert self.engine.grad_norm == pytest.approx(grad_norm(grads, divisor), rel=1e-6, nan_ok=True)
            clip = clip_for(self.engine.grad_norm, self.engine.max_grad_norm)
        self.twin.step(grads, divisor=divisor, clip=np.float32(clip))

    def compare(self):
        for w, exact in zip(self.engine.master(), self.twin.w, strict=True):
            assert_same_bits(w, exact, "master weights")
        first = self.world.rank * self.world.workers
        for worker, x in zip(self.engine.workers, self.twin.x[first:], strict=False):
            for view, exact in zip(worker.weights, x, strict=True):
                assert_same_bits(view, exact, "published weights")

    def state(self):
        points = [view.copy() for worker in self.engine.workers for view in worker.weights]
        return [*self.engine.master(), *points]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extrapolation", KINDS)
def test_mean_gradient_and_displacements_are_clipped_by_one_factor(team, extrapolation, streaming):
    twins = Twins(team, extrapolation, max_grad_norm=0.5, streaming=streaming)
    for scale in (1.0, 1e-6, 100.0):
        twins.step(scale)
    twins.engine.max_grad_norm = None
    twins.step()
    assert twins.engine.grad_norm is None
    twins.engine.max_grad_norm = float("inf")
    twins.step(divisor=3.0)
    assert twins.engine.grad_norm is not None
    twins.compare()
    twins.engine.close()


@pytest.mark.parametrize("rule", xc._core.rules())
def test_every_rule_clips_before_anything_else(team, rule):
    twins = Twins(team, rule=rule, max_grad_norm=0.5, skip_nonfinite=True)
    for scale, poison in ((1.0, None), (1e-6, None), (1.0, np.nan), (100.0, None)):
        twins.step(scale, poison=poison)
    twins.compare()
    twins.engine.close()


@pytest.mark.parametrize("tile", [1, 7, 100, 1024, 5000])
def test_clipped_bits_do_not_depend_on_the_tile(team, tile):
    one, other = Twins(team, "local", max_grad_norm=0.5), Twins(team, "local", tile, max_grad_norm=0.5)
    for twins in (one, other):
        twins.step()
        twins.step()
    assert one.engine.grad_norm == other.engine.grad_norm
    for a, b in zip(one.state(), other.state(), strict=True):
        assert_same_bits(a, b)
    one.engine.close()
    other.engine.close()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_gradient_of_one_worker_is_skipped_by_all(team, poison):
    twins = Twins(team, "local", skip_nonfinite=True)
    twins.step()
    before = twins.state()
    twins.step(poison=poison)
    assert twins.engine.skipped and not np.isfinite(twins.engine.grad_norm)
    for now, then in zip(twins.state(), before, strict=True):
        assert_same_bits(now, then)
    twins.step()
    assert not twins.engine.skipped
    twins.compare()
    twins.engine.close()


def test_without_skipping_a_non_finite_gradient_spreads_as_in_torch(world):
    twins = Twins(world, max_grad_norm=1.0)
    twins.step(poison=np.nan)
    assert np.isnan(twins.engine.master()[0]).all()
    twins.engine.close()


@pytest.mark.parametrize("extrapolation", KINDS)
def test_divisor_divides_gradients_and_local_displacements(team, extrapolation):
    twins = Twins(team, extrapolation)
    for divisor in (4.0, 1.0, 3.0):
        twins.step(divisor=divisor)
    twins.compare()
    twins.engine.close()


def test_wrong_values_are_refused_alike(world):
    w = np.ones(3, np.float32)
    for wrong in (0, -1.0, float("nan"), "1"):
        with pytest.raises(xc.UsageError, match="max_grad_norm must be None or a positive number"):
            xc.Engine(world, w, max_grad_norm=wrong)
    engine = xc.Engine(world, w)
    engine.max_grad_norm = -2.0 if world.rank == world.size - 1 else None
    with pytest.raises(xc.UsageError, match="max_grad_norm must be None or a positive number, not -2"):
        engine.step()
    engine.max_grad_norm = None
    for wrong in (0, -1, float("inf"), float("nan"), "x"):
        with pytest.raises(xc.UsageError, match="divisor must be a positive number"):
            engine.step(divisor=wrong)
    engine.skip_nonfinite = True
    with pytest.raises(xc.UsageError, match="step_unfused"):
        engine.step_unfused()
    engine.close()


@pytest.mark.parametrize("odd", ["max_grad_norm", "skip_nonfinite", "divisor"])
def test_ranks_that_differ_are_a_mismatch(world, odd):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    engine = xc.Engine(world, np.ones(3, np.float32), max_grad_norm=1.0)
    engine.grads[:] = 1
    divisor = 1.0
    if world.rank == world.size - 1:
        if odd == "divisor":
            divisor = 2.0
        else:
            setattr(engine, odd, {"max_grad_norm": None, "skip_nonfinite": True}[odd])
    with pytest.raises(xc.MismatchError, match=f"{odd}.* is 1 on rank 0|{odd}.* is 0 on rank 0"):
        engine.step(divisor=divisor)
    assert (engine.master() == 1).all()
    engine.close()


# --- torch optimizers -----------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")


def model_and_batches(world, batches, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    random = torch.Generator().manual_seed(1)
    of_all = torch.randn(batches, world.K, 6, 5, generator=random)
    first = world.rank * world.workers
    return model, of_all, of_all[:, first : first + world.workers]


def backward(model, x):
    model(x).square().mean().backward()


def test_clipped_step_is_torchs_on_the_mean_gradient(team):
    model, of_all, mine = model_and_batches(team, 5)
    twin, _, _ = model_and_batches(team, 5)
    opt = xc.SGD(model.parameters(), lr=0.5, momentum=0.9, world=team, max_grad_norm=0.05)
    judge = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9)
    for xs, own in zip(of_all, mine, strict=True):
        opt.zero_grad()
        for v in range(team.workers):
            with opt.worker(v):
                backward(model, own[v])
        opt.step()
        judge.zero_grad()
        backward(twin, xs.flatten(0, 1))
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        judge.step()
        assert opt.grad_norm == pytest.approx(norm.item(), rel=1e-4) and opt.grad_norm > 0.05
    for i, p in enumerate(twin.parameters()):
        torch.testing.assert_close(opt.master(i), p.detach(), rtol=1e-4, atol=1e-6)
    opt.close()


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
@pytest.mark.parametrize("accumulation", ["mean", "sum"])
def test_micro_batches_are_one_batch(team, accumulation, gradients):
    model, of_all, mine = model_and_batches(team, 3)
    twin, _, _ = model_and_batches(team, 3)
    opt = xc.SGD(
        model.parameters(), lr=0.1, momentum=0.9, world=team, accumulation=accumulation, gradients=gradients
    )
    judge = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        opt.zero_grad()
        judge.zero_grad()
        for v in range(team.workers):
            with opt.worker(v):
                for x in mine[:-1, v]:
                    with opt.no_sync():
                        backward(model, x)
                backward(model, mine[-1, v])
        opt.step()
        for xs in of_all:
            backward(twin, xs.flatten(0, 1))
        if accumulation == "mean":
            torch._foreach_div_([p.grad for p in twin.parameters()], 3.0)
        judge.step()
    for i, p in enumerate(twin.parameters()):
        torch.testing.assert_close(opt.master(i), p.detach(), rtol=1e-4, atol=1e-6)
    opt.close()


def test_count_of_micro_batches_ends_with_the_step_and_with_zero_grad(world):
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    opt = xc.SGD(model.parameters(), lr=1.0, world=world)
    with opt.no_sync():
        model(torch.ones(1, 2)).sum().backward()
    opt.zero_grad()
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        opt.step()
        opt.zero_grad()
    assert opt.master(0).tolist() == [[-2.0, -2.0]]
    opt.close()


def test_mistakes_around_accumulation_are_refused(worlds):
    world = worlds(2)
    model = torch.nn.Linear(2, 1)
    opt = xc.SGD(model.parameters(), lr=1.0, world=world)
    with opt.no_sync(), pytest.raises(xc.UsageError, match="step\\(\\) inside no_sync"):
        opt.step()
    opt.zero_grad()
    with opt.worker(1), opt.no_sync():
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(xc.UsageError, match="have accumulated \\[1, 2\\] micro-batches"):
        opt.step()
    opt.zero_grad()
    opt.step()
    opt.close()
    for wrong in ({"accumulation": "max"}, {"gradients": "magic"}):
        with pytest.raises(xc.UsageError, match="must be one of"):
            xc.SGD(model.parameters(), world=world, **wrong)


def test_ranks_that_accumulate_differently_are_a_mismatch(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model = torch.nn.Linear(2, 1)
    opt = xc.SGD(model.parameters(), lr=1.0, world=world)
    for _ in range(1 + world.rank):
        with opt.no_sync():
            model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(xc.MismatchError, match="divisor of the gradients .* is 2 on rank 0 but 3 on rank 1"):
        opt.step()
    opt.close()


def test_clipping_between_backward_and_step_is_warned_of_once(worlds, caplog):
    world = worlds(2)
    model = torch.nn.Linear(2, 1)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    for clip in (False, False, True, True):
        opt.zero_grad()
        for v in range(2):
            with opt.worker(v):
                for _ in range(2):
                    model(torch.ones(1, 2)).sum().backward()
        if clip:
            assert not caplog.records
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        if not clip:
            assert not caplog.records
        elif len(caplog.records) == 1:
            assert "set max_grad_norm instead" in caplog.text
            break
    opt.step()
    assert len(caplog.records) == 1
    opt.close()


# --- loss scaling ---------------------------------------------------------------------------------------------------


def train_scaled(world, poisoned_rank, unscale=False):
    model, _, mine = model_and_batches(world, 6)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    scaler = xc.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    scales, skipped = [], []
    for step, own in enumerate(mine):
        opt.zero_grad()
        x = own[0] * (float("inf") if step == 1 and world.rank == poisoned_rank else 1.0)
        scaler.scale(model(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped.append(opt.skipped)
    weights = [opt.master(i) for i in range(4)]
    opt.close()
    return scales, skipped, weights


@pytest.mark.parametrize("unscale", [False, True])
def test_scaler_skips_and_changes_its_scale_alike_on_all_ranks(world, unscale):
    scales, skipped, weights = train_scaled(world, world.size - 1, unscale)
    assert scales == [8.0, 4.0, 4.0, 4.0, 8.0, 8.0]
    assert skipped == [False, True, False, False, False, False]
    assert all(torch.isfinite(w).all() for w in weights)


def test_scale_does_not_change_the_weights(world):
    model, _, mine = model_and_batches(world, 6)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    for own in mine:
        opt.zero_grad()
        backward(model, own[0])
        opt.step()
    _, _, scaled = train_scaled(world, poisoned_rank=-1)
    for i, w in enumerate(scaled):
        torch.testing.assert_close(opt.master(i), w, rtol=1e-5, atol=1e-7)
    opt.close()


def test_torchs_own_scaler_is_refused_and_a_disabled_one_accepted(world):
    model = torch.nn.Linear(2, 1)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    with pytest.raises(xc.UsageError, match="use xc.GradScaler"):
        scaler.step(opt)
    opt.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    torch.amp.GradScaler("cpu", enabled=False).step(opt)
    xc.GradScaler("cpu", enabled=False).step(opt)
    opt.close()


def test_scaler_treats_other_optimizers_as_torch_does():
    model = torch.nn.Linear(2, 1)
    opt, scaler = torch.optim.SGD(model.parameters(), lr=0.1), xc.GradScaler("cpu", init_scale=8.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(opt)
    scaler.update()
    torch.testing.assert_close(model.weight, before - 0.1)


def test_scaler_steps_once_between_updates(world):
    model = torch.nn.Linear(2, 1)
    opt, scaler = xc.SGD(model.parameters(), lr=0.1, world=world), xc.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(opt)
    opt.close()


def test_scaler_refuses_to_unscale_one_of_several_workers(worlds):
    model = torch.nn.Linear(2, 1)
    opt, scaler = xc.SGD(model.parameters(), lr=0.1, world=worlds(2)), xc.GradScaler("cpu")
    with pytest.raises(xc.UsageError, match="sees one of this rank's 2 workers"):
        scaler.unscale_(opt)
    opt.close()


def test_loss_scale_that_is_no_number_is_refused(world):
    model = torch.nn.Linear(2, 1)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    for scale in (float("nan"), float("inf"), 0.0):
        with pytest.raises(xc.UsageError, match="loss scale must be a positive number"):
            opt.scaled_step(scale)
    opt.close()


def test_micro_batches_of_all_workers_may_stand_in_one_no_sync(worlds):
    world = worlds(2)
    model = torch.nn.Linear(2, 1, bias=False)
    opt = xc.SGD(model.parameters(), lr=1.0, world=world)
    before = opt.master(0)

    def everywhere():
        for v in range(2):
            with opt.worker(v):
                model(torch.ones(1, 2)).sum().backward()

    with opt.no_sync():
        everywhere()
    everywhere()
    opt.step()
    torch.testing.assert_close(opt.master(0), before - 1)
    with opt.no_sync(), pytest.raises(xc.UsageError, match="already open"), opt.no_sync():
        pass
    opt.close()


def test_infinite_bound_only_measures(world):
    twins = Twins(world, max_grad_norm=float("inf"))
    twins.step(poison=np.inf)
    assert np.isinf(twins.engine.grad_norm)
    assert sum(np.isnan(w).sum() + np.isinf(w).sum() for w in twins.engine.master()) == 1
    twins.engine.close()
