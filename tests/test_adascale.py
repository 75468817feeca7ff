"""AdaScale inside the step: what is measured, what the gain multiplies, and what all ranks hold alike."""

import io
import math

import numpy as np
import pytest
import reference
from conftest import COMM, LIMITS, stored
from reference import ReferenceEngine, averaged, baseline_sample, gain_ratio, rounded
from test_order import ADAM, NESTEROV, run

import extrapcomm as xc

torch = pytest.importorskip("torch")

LENGTHS = (1500, 1, 0, 1024, 33)
EXACT = {"rel": 1e-9}


@pytest.fixture(params=[2, 3, 7, "ranks", "ranks x 2"], ids=lambda name: f"K={name}")
def many(request, virtual, worlds):
    """Every kind of world of two workers or more."""
    if isinstance(request.param, int):
        return virtual(request.param)
    if COMM.size < 2 and request.param == "ranks":
        pytest.skip("needs two ranks")
    return worlds(2 if request.param == "ranks x 2" else 1)


@pytest.fixture
def several(world):
    """All ranks, if they are two or more."""
    if world.size < 2:
        pytest.skip("needs two ranks to differ")
    return world


# --- figures of other implementations, through the optimizer


def linear(outputs=2, bias=True, inputs=2):
    return torch.nn.Linear(inputs, outputs, bias, dtype=torch.float64)


def backward(model, x, factor=1.0):
    (factor * model(torch.tensor([x], dtype=torch.float64)).sum()).backward()


def accumulate(opt, model, inputs, factor=1.0):
    for x in inputs[:-1]:
        with opt.no_sync():
            backward(model, x, factor)
    backward(model, inputs[-1], factor)


def bring(opt, model, inputs):
    """One input for each worker, or all of them as micro-batches of the only one."""
    if opt.world.K == 1:
        accumulate(opt, model, inputs)
        return
    for v in range(opt.world.workers):
        with opt.worker(v):
            backward(model, inputs[opt.world.rank * opt.world.workers + v])


@pytest.fixture(params=["ranks", "workers", "micro-batches"])
def pair_of_gradients(request, virtual):
    """Two gradients per step: from two ranks, of two workers of one rank, of two micro-batches."""
    if request.param != "ranks":
        yield virtual(2 if request.param == "workers" else 1)
        return
    if COMM.size < 2:
        pytest.skip("needs two ranks")
    part = COMM.Split(COMM.rank // 2, COMM.rank)
    if part.size == 2:
        with xc.World(part, **LIMITS) as world:
            yield world
    else:
        yield virtual(2)
    part.Free()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "first, second, exact",
    [
        ([1, 0], [0, 1], 1.3333333333333333),
        ([1, 1], [1, 1], 1.0000000833333264),
        ([-1, 1], [1, -1], 2.0),
        ([1, 4], [5, 0.5], 1.468879668049793),
        ([-0.2, 3], [5, 0.5], 1.84728938661),
    ],
)
def test_two_gradients_have_fairscales_gain(pair_of_gradients, first, second, exact, lag):
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=pair_of_gradients, gain=xc.AdaScale(lag=lag))
    gains = []
    for _ in range(1 + lag):
        bring(opt, model, [first, second])
        opt.step()
        opt.zero_grad()
        gains.append(opt.gain)
    opt.close()
    assert gains == pytest.approx([1.0, exact][1 - lag :], **EXACT)


@pytest.mark.parametrize("averaging, exact", [("debiased", 1.67209693445), ("mean", 1.67223432583)])
def test_two_steps_are_averaged(pair_of_gradients, averaging, exact):
    model = linear()
    estimator = xc.AdaScale(averaging=averaging)
    opt = xc.SGD(model.parameters(), lr=0.1, world=pair_of_gradients, gain=estimator)
    for inputs in ([-0.2, 3.3], [5.2, 0.7]), ([1, 4], [3.1, 0.1]):
        bring(opt, model, inputs)
        opt.step()
        opt.zero_grad()
    assert opt.gain == pytest.approx(exact, **EXACT)
    assert opt.progress == pytest.approx(exact + gain_ratio(35.92, 4.54, 2), rel=1e-6)
    opt.close()


@pytest.mark.parametrize("accumulation, factor", [("mean", 1.0), ("sum", 1.0), ("sum", 0.25)])
@pytest.mark.parametrize("scale", [None, 4 / 3, 2.0, 4.0])
def test_gain_of_four_orthogonal_micro_batches_is_the_scale(virtual, scale, accumulation, factor):
    model = linear(bias=False, inputs=4)
    how = {"accumulation": accumulation, "gain": xc.AdaScale(scale)}
    opt = xc.SGD(model.parameters(), lr=0.1, world=virtual(1), **how)
    accumulate(opt, model, np.eye(4).tolist(), factor)
    before = opt.master(0)
    opt.step()
    assert opt.gain == pytest.approx(scale or 4.0, **EXACT)
    moved = (before - opt.master(0)).numpy()
    np.testing.assert_allclose(moved, 0.1 * opt.gain * (1 / 4 if accumulation == "mean" else factor))
    opt.close()


# --- the same loop in float64


def gradients(random, K, dtype="float64"):
    """K workers' gradients with something in common, so that the gain is neither 1 nor K."""
    common = [random.normal(size=n) for n in LENGTHS]
    mine = [[c + 2 * random.normal(size=c.size) for c in common] for _ in range(K)]
    return [[rounded(g.astype("float32"), dtype).astype("float64") for g in of_one] for of_one in mine]


def give(engine, grads, dtype="float64"):
    first = engine.world.rank * engine.world.workers
    for worker, mine in zip(engine.workers, grads[first:], strict=False):
        for view, g in zip(worker.grads, mine, strict=True):
            view[...] = stored(g.astype("float32"), dtype) if dtype != "float64" else g


class Samples:
    """The gains of one step after another, from their definition."""

    def __init__(self, scale, lag=0):
        self.scale, self.lag = scale, lag
        self.of_steps = []
        self.gain = 1.0

    def take(self, grads):
        before = self.of_steps
        self.of_steps = [*before, baseline_sample([np.concatenate(g) for g in grads], self.scale)]
        used = before if self.lag else self.of_steps
        self.gain = self.gain_of(used) if used else 1.0
        return self.gain

    def gain_of(self, samples):
        smoothing = [max(1 - self.scale / 1000, 0)] * len(samples)
        var, sqr = (averaged(each, smoothing, "mean") for each in zip(*samples, strict=True))
        return gain_ratio(var, sqr, self.scale)


def train_beside(world, lag=0, steps=4, scale=None, **options):
    """An engine and the reference, fed with the same gradients; compared after each step."""
    random = np.random.default_rng(3)
    initial = [random.normal(size=n) for n in LENGTHS]
    engine = xc.Engine(world, initial, lr=0.1, gain=xc.AdaScale(scale, lag=lag), **options)
    twin = ReferenceEngine(initial, world.K, **options)
    samples = Samples(scale or world.K, lag)
    total = 0.0
    for step in range(steps):
        lr = 0.1 / (step + 1)
        grads = gradients(random, world.K)
        give(engine, grads)
        engine.step(lr=lr)
        total += samples.take(grads)
        twin.step(grads, lr=lr * samples.gain)
        assert engine.gain == pytest.approx(samples.gain, **EXACT)
        assert engine.progress == pytest.approx(total, **EXACT)
        compare(engine, twin)
    engine.close()


def compare(engine, twin):
    for w, exact in zip(engine.master(), twin.w, strict=True):
        np.testing.assert_allclose(w, exact, rtol=1e-8, atol=1e-10)
    first = engine.world.rank * engine.world.workers
    for worker, x in zip(engine.workers, twin.x[first:], strict=False):
        for view, exact in zip(worker.weights, x, strict=True):
            np.testing.assert_allclose(view, exact, rtol=1e-8, atol=1e-10)


RULES = {
    "sgd": {"rule": "sgd"},
    "momentum": {"rule": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"rule": "adam", "weight_decay": 0.01},
    "lars": {"rule": "lars", "momentum": 0.9, "trust_coefficient": 0.1},
    "lamb": {"rule": "lamb"},
}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("extrapolation", ["none", "local"])
@pytest.mark.parametrize("rule", RULES)
def test_gain_multiplies_the_learning_rate_of_the_same_loop(many, rule, extrapolation, lag):
    train_beside(many, lag, extrapolation=extrapolation, **RULES[rule])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("inner_lr", ["lr", "lr/K", lambda lr: 0.3 * math.sqrt(lr), 0.05])
def test_inner_rates_follow_the_gain_unless_they_are_numbers(many, inner_lr, lag):
    train_beside(many, lag, extrapolation="local", inner_lr=inner_lr, momentum=0.9)


@pytest.mark.parametrize("scale", [1.0, 2.5, 32.0])
def test_scale_need_not_be_the_number_of_workers(many, scale):
    train_beside(many, scale=scale)


@pytest.mark.parametrize("dtype", xc._core.dtypes())
def test_sums_of_every_type_are_of_its_own_numbers_in_double(many, dtype):
    random = np.random.default_rng(5)
    initial = [stored(random.normal(size=n).astype("float32"), dtype) for n in LENGTHS]
    engine = xc.Engine(many, initial, lr=0.1, gain=xc.AdaScale())
    samples = Samples(many.K)
    for _ in range(2):
        grads = gradients(random, many.K, dtype)
        give(engine, grads, dtype)
        engine.step()
        assert engine.gain == pytest.approx(samples.take(grads), rel=1e-5)
    engine.close()


# --- bits


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("options", [NESTEROV, ADAM], ids=["nesterov", "adam"])
def test_tile_size_does_not_change_the_bits(many, options, lag):
    got = {run(many, tile=t, gain=xc.AdaScale(lag=lag), **options) for t in (7, 64, 1000, 100_000)}
    assert len(got) == 1


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_four_workers_give_the_same_bits_on_any_number_of_ranks(virtual, ranks, lag):
    if COMM.size < ranks:
        pytest.skip(f"needs {ranks} ranks")
    part = COMM.Split(COMM.rank // ranks, COMM.rank)
    if part.size == ranks:
        with xc.World(part, workers=4 // ranks, **LIMITS) as world:
            got = run(world, gain=xc.AdaScale(lag=lag), **NESTEROV)
    else:
        got = run(virtual(4), gain=xc.AdaScale(lag=lag), **NESTEROV)
    part.Free()
    assert got == run(virtual(4), gain=xc.AdaScale(lag=lag), **NESTEROV)
    assert got != run(virtual(4), **NESTEROV)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("rule", reference.RULES)
def test_gain_of_scale_one_is_the_plain_optimizer(many, rule, lag):
    options = {"rule": rule, "extrapolation": "local"}
    assert run(many, gain=xc.AdaScale(1.0, lag=lag), **options) == run(many, **options)


# --- the scale-invariant time


def bowl(world, steps, gain=None, lr=0.02):
    """Mean of f after SGD on f = w^2 / 2 with noise until the time of the schedule is over; and how many steps."""
    random = np.random.default_rng(1)
    engine = xc.Engine(world, np.full(1000, 3.0), lr=lr, gain=gain)
    taken, time = 0, 0.0
    while time < steps:
        noise = random.normal(size=(world.K, 1000))
        first = world.rank * world.workers
        for v, worker in enumerate(engine.workers):
            worker.grads[:] = worker.weights + 2 * noise[first + v]
        engine.step(lr=lr * 0.5 ** (int(time) // 60))
        taken, time = taken + 1, taken + 1.0 if gain is None else engine.progress
    f = float(np.mean(engine.master() ** 2)) / 2
    engine.close()
    return f, taken


def test_schedule_over_progress_ends_where_the_small_batch_does_after_fewer_steps(virtual):
    small, _ = bowl(virtual(1), 180)
    large, steps = bowl(virtual(8), 180, xc.AdaScale())
    plain, _ = bowl(virtual(8), steps)
    assert 180 / 8 <= steps < 0.6 * 180
    assert 0.7 * small < large < small
    assert plain > 2 * small


def test_scale_may_change_between_steps_and_the_averages_remain(virtual):
    engine = xc.Engine(virtual(4), [np.zeros(n) for n in LENGTHS], lr=0.1, gain=xc.AdaScale(4.0))
    random, samples = np.random.default_rng(0), []
    for scale in (4.0, 8.0, 2.0):
        engine.set_scale(scale)
        grads = gradients(random, 4)
        give(engine, grads)
        engine.step()
        samples.append(baseline_sample([np.concatenate(g) for g in grads], scale))
        assert engine.gain == pytest.approx(gain_ratio(*np.mean(samples, axis=0), scale), **EXACT)
    with pytest.raises(xc.UsageError, match="scale"):
        engine.set_scale(0.5)
    engine.close()


# --- what it inherits from extrapolation


@pytest.mark.parametrize("inner_lr, ratio", [(0.0, 1.0), (0.2, 1.04), (0.5, 1.33)])
def test_variance_measured_at_displaced_points_is_too_large(virtual, inner_lr, ratio):
    """Worker k's gradient at w - inner_lr g_k has the variance sigma^2 / (1 - (inner_lr h)^2) for f = h w^2 / 2."""
    world, h, sigma, count = virtual(16), 1.0, 2.0, 2000
    random, estimator = np.random.default_rng(2), xc.AdaScale(smoothing=0.0)
    how = {"extrapolation": "local", "inner_lr": inner_lr, "gain": estimator}
    engine = xc.Engine(world, np.ones(count), lr=0.01, **how)
    found = []
    for _ in range(25):
        for worker in engine.workers:
            worker.grads[:] = h * worker.weights + sigma * random.normal(size=count)
        engine.step()
        found += estimator.state_dict()["var"]
    engine.close()
    assert 1 / (1 - (inner_lr * h) ** 2) == pytest.approx(ratio, rel=0.005)
    assert np.mean(found[10:]) / (count * sigma**2) == pytest.approx(ratio, rel=0.01)


# --- groups, presence, clipping


@pytest.mark.parametrize("per_group", [False, True])
def test_groups_share_one_gain_unless_each_has_its_own(many, per_group):
    random = np.random.default_rng(8)
    params = [torch.nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.3}]
    opt = xc.SGD(groups, lr=0.1, world=many, gain=xc.AdaScale(per_group=per_group))
    grads = [[1 + spread * random.normal(size=50) for spread in (1, 4, 4)] for _ in range(many.K)]
    for v in range(many.workers):
        with opt.worker(v):
            for p, g in zip(params, grads[many.rank * many.workers + v], strict=True):
                p.grad = torch.from_numpy(g)
    opt.step()
    of_groups = [[np.concatenate(g[a:b]) for g in grads] for a, b in ((0, 1), (1, 3))]
    if per_group:
        samples = np.array([baseline_sample(g, many.K) for g in of_groups])
        gains, gain = [gain_ratio(*s, many.K) for s in samples], gain_ratio(*samples.sum(axis=0), many.K)
    else:
        gain = gain_ratio(*baseline_sample([np.concatenate(g) for g in grads], many.K), many.K)
        gains = [gain, gain]
    assert opt.gain == pytest.approx(gain, **EXACT)
    for i, rate in enumerate((0.1 * gains[0], 0.3 * gains[1], 0.3 * gains[1])):
        mean = np.mean([g[i] for g in grads], axis=0)
        np.testing.assert_allclose(opt.master(i).numpy(), -rate * mean, rtol=1e-9)
    opt.close()


def test_parameters_without_gradients_do_not_count(many):
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=many, gain=xc.AdaScale(smoothing=0.0))
    gains = []
    for frozen in (False, True):
        model.weight.requires_grad_(not frozen)
        for v in range(many.workers):
            with opt.worker(v):
                backward(model, [float(many.rank * many.workers + v), 1.0])
        opt.step()
        opt.zero_grad()
        gains.append(opt.gain)
    opt.close()
    assert gains[0] > 1.01
    assert gains[1] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_gradients_are_measured_before_they_are_clipped(many, lag):
    random = np.random.default_rng(4)
    grads = gradients(random, many.K)
    estimators = [xc.AdaScale(lag=lag) for _ in range(2)]
    for estimator, bound in zip(estimators, (None, 0.1), strict=True):
        engine = xc.Engine(many, [np.zeros(n) for n in LENGTHS], gain=estimator, max_grad_norm=bound)
        for _ in range(2):
            give(engine, grads)
            engine.step(lr=0.1)
        if bound:
            moved = np.linalg.norm(np.concatenate(engine.master()))
            assert moved == pytest.approx(0.1 * estimator.progress * 0.1, rel=1e-5)
        engine.close()
    assert estimators[0].state_dict() == estimators[1].state_dict()


# --- steps that do not happen


@pytest.mark.parametrize("lag", [0, 1])
def test_skipped_step_leaves_the_estimator_untouched(many, lag):
    estimator = xc.AdaScale(lag=lag)
    engine = xc.Engine(many, [np.zeros(n) for n in LENGTHS], lr=0.1, gain=estimator, skip_nonfinite=True)
    grads = gradients(np.random.default_rng(0), many.K)
    give(engine, grads)
    engine.step()
    before, weights = estimator.state_dict(), engine.master()
    grads[-1][0][5] = np.nan
    give(engine, grads)
    engine.step()
    assert engine.skipped
    assert estimator.state_dict() == before
    assert all(np.array_equal(a, b) for a, b in zip(weights, engine.master(), strict=True))
    engine.close()


@pytest.mark.parametrize("lag", [0, 1])
def test_sums_that_are_not_finite_keep_the_gain(many, lag):
    estimator = xc.AdaScale(lag=lag)
    engine = xc.Engine(many, [np.zeros(n) for n in LENGTHS], lr=0.1, gain=estimator)
    grads = gradients(np.random.default_rng(0), many.K)
    for _ in range(2):
        give(engine, grads)
        engine.step()
    gain, averages = engine.gain, estimator.state_dict()["var"]
    grads[0][0][5] = np.inf
    give(engine, grads)
    engine.step()
    assert (engine.gain, estimator.state_dict()["var"]) == (gain, averages)
    engine.close()


@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scale_is_taken_out_of_both_sums(pair_of_gradients, unscale):
    if unscale and pair_of_gradients.workers > 1:
        pytest.skip("unscale_() is refused for several workers")
    gains = []
    for scaler in (None, xc.GradScaler("cpu", init_scale=8.0)):
        model = linear()
        opt = xc.SGD(model.parameters(), lr=0.1, world=pair_of_gradients, gain=xc.AdaScale())
        inputs = ([1, 4], [5, 0.5])
        if scaler is None:
            bring(opt, model, inputs)
            opt.step()
        else:
            scaled = Scaled(model, scaler)
            bring(opt, scaled, inputs)
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
        gains.append(opt.gain)
        opt.close()
    assert gains == pytest.approx([1.468879668049793] * 2, **EXACT)


class Scaled:
    """A model whose outputs are multiplied by the loss scale."""

    def __init__(self, model, scaler):
        self.model, self.scaler = model, scaler

    def __call__(self, x):
        return self.scaler.scale(self.model(x))


# --- accumulation


@pytest.mark.parametrize("accumulation", ["mean", "sum"])
def test_each_workers_micro_batches_are_one_gradient(many, accumulation):
    """And the scale that is not given counts all micro-batches, so the baseline batch is one of them."""
    model, random = linear(), np.random.default_rng(6)
    inputs = 1 + 2 * random.normal(size=(many.K, 3, 2))
    how = {"accumulation": accumulation, "gain": xc.AdaScale()}
    opt = xc.SGD(model.parameters(), lr=0.1, world=many, **how)
    for v in range(many.workers):
        with opt.worker(v):
            accumulate(opt, model, inputs[many.rank * many.workers + v].tolist())
    before = opt.master(0).numpy().copy()
    opt.step()
    grads = [np.array([*x, *x, 1.0, 1.0]) for x in inputs.mean(axis=1)]
    sample = baseline_sample(grads, 3 * many.K)
    assert opt.gain == pytest.approx(gain_ratio(*sample, 3 * many.K), **EXACT)
    times = 3 if accumulation == "sum" else 1
    moved = 0.1 * opt.gain * times * np.mean(grads, axis=0)[:4].reshape(2, 2)
    np.testing.assert_allclose(before - opt.master(0).numpy(), moved, rtol=1e-9)
    opt.close()


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
def test_one_workers_micro_batches_are_seen_one_by_one(virtual, gradients):
    model = linear()
    how = {"world": virtual(1), "gradients": gradients, "gain": xc.AdaScale(smoothing=0.0)}
    opt = xc.SGD(model.parameters(), lr=0.1, **how)
    for inputs in ([[1, 4], [5, 0.5]], [[-0.2, 3], [5, 0.5], [1, 1]], [[1, 4], [5, 0.5]]):
        accumulate(opt, model, inputs)
        opt.step()
        opt.zero_grad()
        grads = [np.array([*x, *x, 1.0, 1.0]) for x in inputs]
        sample = baseline_sample(grads, len(grads))
        assert opt.gain == pytest.approx(gain_ratio(*sample, len(grads)), **EXACT)
    opt.close()


def test_parameter_that_thaws_is_seen_from_the_next_zero_grad_on(virtual):
    model = linear()
    model.bias.requires_grad_(False)
    opt = xc.SGD(model.parameters(), lr=0.1, world=virtual(1), gain=xc.AdaScale(smoothing=0.0))
    accumulate(opt, model, [[1, 4], [5, 0.5]])
    opt.step()
    model.bias.requires_grad_(True)
    accumulate(opt, model, [[1, 4], [5, 0.5]])
    with pytest.raises(xc.UsageError, match="frozen"):
        opt.step()
    opt.zero_grad()
    accumulate(opt, model, [[1, 4], [5, 0.5]])
    opt.step()
    assert opt.gain == pytest.approx(1.468879668049793, **EXACT)
    opt.close()


# --- checkpoints, groups that come later


def trained(world, state=None, steps=3, load="load_state_dict", **options):
    """An optimizer after some steps, from a state if there is one."""
    torch.manual_seed(0)
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.01, world=world, gain=xc.AdaScale(**options))
    if state is not None:
        getattr(opt, load)(state)
    random = np.random.default_rng(0 if state is None else 1)
    for _ in range(steps):
        bring(opt, model, (1 + random.normal(size=(max(world.K, 2), 2))).tolist())
        opt.step()
        opt.zero_grad()
    return model, opt


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("save, load", [("state_dict",) * 2, ("local_state_dict",) * 2])
def test_checkpoint_continues_the_averages(team, save, load, lag):
    load = f"load_{load}"
    _, first = trained(team, lag=lag)
    file = io.BytesIO()
    torch.save(getattr(first, save)(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    _, second = trained(team, state, load=load, steps=0, lag=lag)
    assert second._gain.estimator.state_dict() == first._gain.estimator.state_dict()
    _, third = trained(team, state, load=load, lag=lag)
    assert third.progress > first.progress
    for opt in (first, second, third):
        opt.close()


def test_torchs_optimizer_loads_the_state_and_ours_loads_torchs(team):
    model, opt = trained(team)
    other = torch.optim.SGD([torch.zeros_like(p, requires_grad=True) for p in model.parameters()], lr=1.0)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.01
    progress = opt.progress
    opt.load_state_dict(other.state_dict())
    assert opt.progress == progress
    opt.close()


def test_state_of_another_kind_is_refused_and_nothing_changes(team):
    _, opt = trained(team)
    _, other = trained(team, per_group=True)
    state, progress = other.state_dict(), opt.progress
    with pytest.raises(xc.UsageError, match="per_group"):
        opt.load_state_dict(state)
    broken = opt.state_dict()
    broken["extrapcomm"]["adascale"] = {"gain": 1.0}
    with pytest.raises(xc.UsageError, match="not the state of an AdaScale"):
        opt.load_state_dict(broken)
    assert opt.progress == progress
    opt.close()
    other.close()


def test_ranks_that_load_different_averages_are_told(several):
    _, opt = trained(several)
    state = opt.state_dict()
    state["extrapcomm"]["adascale"]["progress"] += several.rank
    with pytest.raises(xc.MismatchError):
        opt.load_state_dict(state)
    opt.close()


@pytest.mark.parametrize("per_group", [False, True])
def test_group_that_is_added_later_counts(team, per_group):
    model, opt = trained(team, per_group=per_group)
    more = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt.add_param_group({"params": [more]})

    def both(x):
        return torch.cat([model(x), (x @ more)[:, None]], dim=1)

    before = opt.progress
    bring(opt, both, [[1.0, 0.0], [0.0, 1.0], *[[1.0, 1.0]] * max(team.K - 2, 0)])
    opt.step()
    estimator = opt._gain.estimator
    assert estimator.state_dict()["samples"] == ([4, 1] if per_group else [4])
    assert opt.progress == before + opt.gain
    opt.close()


# --- errors


def test_one_worker_alone_has_no_gain_without_micro_batches(virtual):
    with pytest.raises(xc.UsageError, match="more workers"):
        xc.Engine(virtual(1), np.ones(3), gain=xc.AdaScale())
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=virtual(1), gain=xc.AdaScale())
    backward(model, [1, 2])
    with pytest.raises(xc.UsageError, match=r"no_sync"):
        opt.step()
    opt.zero_grad()
    accumulate(opt, model, [[1, 0], [0, 1]])
    opt.step()
    assert opt.gain == pytest.approx(4 / 3)
    opt.close()


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_micro_batch_in_two_backward_passes_is_refused_on_one_worker(virtual, how):
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=virtual(1), gain=xc.AdaScale(), accumulation=how)
    with opt.no_sync():
        backward(model, [1, 0])
        backward(model, [0, 1])
    backward(model, [1, 1])
    with pytest.raises(xc.UsageError, match="backward passes"):
        opt.step()
    opt.close()


def test_gradients_given_by_hand_are_refused_on_one_worker(virtual):
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=virtual(1), gain=xc.AdaScale())
    with opt.no_sync():
        model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(xc.UsageError, match="came otherwise"):
        opt.step()
    opt.close()


def test_clipping_one_workers_gradients_is_warned_of(virtual, caplog):
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=virtual(1), gain=xc.AdaScale())
    accumulate(opt, model, [[1, 0], [0, 1]])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()
    assert "taken for noise" in caplog.text
    opt.close()


def test_what_is_no_estimator_is_refused(world):
    with pytest.raises(xc.UsageError, match="AdaScale"):
        xc.SGD(linear().parameters(), lr=0.1, world=world, gain=2.0)
    with pytest.raises(xc.UsageError, match="AdaScale"):
        xc.Engine(world, np.ones(3), gain=True)
    with pytest.raises(xc.UsageError, match="lag"):
        xc.AdaScale(lag=2)


def test_optimizer_without_gain_says_how_to_have_one(world):
    opt = xc.SGD(linear().parameters(), lr=0.1, world=world)
    for ask in (lambda: opt.gain, lambda: opt.progress, lambda: opt.set_scale(2.0)):
        with pytest.raises(xc.UsageError, match="gain=AdaScale"):
            ask()
    opt.close()


def test_unfused_step_has_no_gain(many):
    engine = xc.Engine(many, np.ones(3), gain=xc.AdaScale())
    with pytest.raises(xc.UsageError, match="no gain"):
        engine.step_unfused()
    engine.close()


def test_ranks_with_different_estimators_are_told_at_construction(several):
    with pytest.raises(xc.MismatchError, match="AdaScale"):
        xc.Engine(several, np.ones(3), gain=xc.AdaScale(per_group=several.rank == 0))
    with pytest.raises(xc.MismatchError, match="AdaScale"):
        xc.Engine(several, np.ones(3), gain=xc.AdaScale() if several.rank else None)


@pytest.mark.parametrize("lag", [0, 1])
def test_scale_that_one_rank_changes_alone_is_named(several, lag):
    engine = xc.Engine(several, np.ones(3), gain=xc.AdaScale(lag=lag))
    engine.grads[:] = several.rank
    engine.step()
    last = several.size - 1
    if several.rank == last:
        engine.set_scale(7.0)
    with pytest.raises(xc.MismatchError, match=f"scale .* is 0 on rank 0 but 7 on rank {last}|^lr of"):
        engine.step()
    engine.set_scale(7.0)
    engine.step()
    engine.close()


def test_different_numbers_of_micro_batches_are_named_even_if_they_are_summed(several):
    model = linear()
    opt = xc.SGD(model.parameters(), lr=0.1, world=several, accumulation="sum", gain=xc.AdaScale())
    accumulate(opt, model, [[1, 0]] * (2 if several.rank else 1))
    with pytest.raises(xc.MismatchError, match="micro-batches"):
        opt.step()
    opt.close()


def test_inner_rates_that_follow_the_gain_on_one_rank_only_are_named(several):
    """Before the gain "lr" and the number 0.1 are the same."""
    inner = "lr" if several.rank == 0 else 0.1
    options = {"lr": 0.1, "extrapolation": "local", "inner_lr": inner, "gain": xc.AdaScale()}
    engine = xc.Engine(several, np.ones(10), **options)
    with pytest.raises(xc.MismatchError, match="how inner_lr follows lr"):
        engine.step()
    engine.close()
