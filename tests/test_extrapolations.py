"""Every kind of displacement: against the reference, on quadratics, and where it cannot be."""

import numpy as np
import pytest
from conftest import loaded, stored
from reference import RANDOM, RULES, ReferenceEngine, assert_same_bits, noise, rounded

import extrapcomm as xc

KINDS = xc._core.extrapolations()
LISTED = xc._core.rules()
LENGTHS = [5, 700, 1, 900, 0, 513, 2000]
SHAPES = [(5, 700), (3, 2, 2, 400), (70, 16), (1, 2100), (33, 1)]


class Filtered:
    """An engine on arrays with filters beside its reference."""

    def __init__(self, world, tile=512, dtype="float32", **options):
        self.random = np.random.default_rng(3)
        self.world, self.dtype = world, dtype
        weights = [self.normal(shape) for shape in SHAPES]
        self.engine = xc.Engine(world, [stored(w, dtype) for w in weights], tile=tile, **options)
        self.exact = ReferenceEngine(weights, world.K, dtype=dtype, **options)

    def normal(self, shape):
        return rounded(self.random.normal(size=shape).astype("float32"), self.dtype)

    def step(self, **hyper):
        grads = [[self.normal(shape) for shape in SHAPES] for _ in range(self.world.K)]
        first = self.world.rank * self.world.workers
        for v, worker in enumerate(self.engine.workers):
            for view, g in zip(worker.grads, grads[first + v], strict=True):
                view[...] = stored(g, str(view.dtype).removeprefix("torch."))
        self.engine.step(**hyper)
        self.exact.step(grads, **hyper)
        for v, worker in enumerate(self.engine.workers):
            for view, x in zip(worker.weights, self.exact.x[first + v], strict=True):
                assert_same_bits(loaded(view), x)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("rule", LISTED)
def test_random_displacement_equals_the_reference(pair, team, rule, kind):
    options = {"rule": rule, "extrapolation": kind, "noise": 0.3, "seed": 2**63 + 5, "tile": 100}
    p = pair(team, LENGTHS, "float32", **options)
    for lr in (0.1, 0.05):
        p.step(lr=lr)
        p.compare(1e-4)


@pytest.mark.parametrize("tile", [1, 100, 512, 5000])
def test_filter_noise_equals_the_reference_whatever_the_tile(team, tile):
    """Filters straddle tiles and shards."""
    f = Filtered(team, tile=tile, extrapolation="filter", inner_lr=0.1, seed=7, momentum=0.9)
    for _ in range(2):
        f.step(lr=0.1)
    f.engine.close()


def test_filter_noise_of_narrow_weights_and_another_rule(team):
    f = Filtered(team, dtype="bfloat16", rule="lamb", extrapolation="filter", inner_lr=0.2)
    f.step(lr=0.1)
    f.engine.close()


def test_filter_noise_is_as_long_as_the_filter(virtual):
    engine = xc.Engine(virtual(2), np.ones((4, 100)), extrapolation="filter", inner_lr=0.5)
    engine.step(lr=0.1)
    for worker in engine.workers:
        lengths = np.linalg.norm(worker.weights - engine.master(), axis=1)
        np.testing.assert_allclose(lengths, 0.5 * 10, rtol=1e-12)
    engine.close()


def test_filter_of_zeros_is_not_displaced(team):
    w = np.ones((3, 50), np.float32)
    w[1] = 0
    engine = xc.Engine(team, w, extrapolation="filter", inner_lr=0.5)
    engine.step(lr=0.1)
    assert_same_bits(engine.weights[1], w[1])
    assert (engine.weights[[0, 2]] != 1).any()
    engine.close()


def test_workers_steps_and_seeds_have_noise_of_their_own(virtual):
    seen = []
    for seed in (0, 1):
        options = {"extrapolation": "gaussian", "inner_lr": 1.0, "seed": seed}
        engine = xc.Engine(virtual(3), np.zeros(64), **options)
        for _ in range(2):
            engine.step(lr=0.0)
            seen += [worker.weights.copy() for worker in engine.workers]
        engine.close()
    assert len({x.tobytes() for x in seen}) == 12


def test_noise_goes_on_after_a_checkpoint(world):
    """Its step is the layer's count of updates, which checkpoints hold."""
    torch = pytest.importorskip("torch")

    def train(steps, state=None):
        param = torch.nn.Parameter(torch.zeros(50))
        opt = xc.SGD([param], lr=0.0, extrapolation="uniform", inner_lr=1.0, world=world)
        if state:
            opt.load_state_dict(state)
        for _ in range(steps):
            param.grad = torch.ones(50)
            opt.step()
        found, state = param.detach().clone(), opt.state_dict()
        opt.close()
        return found, state

    whole, _ = train(3)
    _, half = train(2)
    rest, _ = train(1, half)
    assert_same_bits(rest.numpy(), whole.numpy())


@pytest.mark.parametrize("inner_clip", [True, False])
@pytest.mark.parametrize("kind", ["local", "global", "anisotropic"])
def test_inner_clip_says_whether_displacements_are_clipped(team, kind, inner_clip):
    """Gradients of norm 50 and 100; clipped to 1 and displaced by either."""
    engine = xc.Engine(
        team, np.zeros(100), extrapolation=kind, inner_lr=1.0, inner_clip=inner_clip, max_grad_norm=1.0
    )
    sizes = [5.0 * (1 + (team.rank * team.workers + v) % 2) for v in range(team.workers)]
    for worker, size in zip(engine.workers, sizes, strict=True):
        worker.grads[:] = size
    engine.step(lr=0.0)
    mean = np.mean([5.0 * (1 + k % 2) for k in range(team.K)])
    clip = 1 / (10 * mean) if inner_clip else 1.0
    for worker, size in zip(engine.workers, sizes, strict=True):
        zeta = {"local": size, "global": mean, "anisotropic": size - mean}[kind]
        np.testing.assert_allclose(worker.weights, -clip * zeta, rtol=1e-6, atol=1e-12)
    engine.close()


LR = {"sgd": 0.1, "sgdp": 0.1, "vrsgd": 0.3, "eg": 0.02, "adam": 0.05, "adamp": 0.05, "vradam": 0.05}
LR |= dict.fromkeys(["lars", "clars", "vrlars"], 0.5) | dict.fromkeys(["lamb", "vrlamb", "lans"], 0.02)
OPTIONS = dict.fromkeys(["lars", "clars", "vrlars"], {"trust_coefficient": 0.1})


@pytest.mark.parametrize("displacement", ["preconditioned", "raw"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", LISTED)
def test_rule_and_displacement_descend_a_quadratic(virtual, rule, kind, displacement):
    """f_k(w) = |A^1/2 (w - b_k)|^2 / 2 with the mean of all b_k at zero."""
    K, curvature = 4, np.linspace(0.2, 1.0, 12).reshape(3, 4)
    b = np.array([1.0, -1.0, 0.5, -0.5])
    w = np.full((3, 4), 2.0)
    options = {"displacement": displacement, "noise": 0.1, **OPTIONS.get(rule, {})}
    engine = xc.Engine(virtual(K), w, rule, extrapolation=kind, inner_lr="lr", **options)
    for _ in range(80):
        for worker, own in zip(engine.workers, b, strict=True):
            worker.grads[...] = curvature * (worker.weights - own)
        engine.step(lr=LR[rule])
    left = np.sum(curvature * engine.master() ** 2) / np.sum(curvature * w**2)
    assert left < 0.1, f"{left:.3f} of f is left"
    engine.close()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"extrapolation": "nonsense"}, "there is no extrapolation 'nonsense'; there are none, local"),
        ({"displacement": "cooked"}, "displacement must be one of preconditioned, raw, not 'cooked'"),
        ({"extrapolation": "gaussian", "noise": -1.0}, "noise must not be negative"),
        ({"extrapolation": "gaussian", "noise": float("nan")}, "noise must be finite"),
        ({"extrapolation": "gaussian", "seed": -1}, "seed must be a whole number"),
        ({"extrapolation": "filter"}, r"parameter 'weights' of shape \(3,\) has no filters"),
    ],
)
def test_wrong_displacements_are_refused_by_all(world, wrong, words):
    own = wrong if world.rank == world.size - 1 else {}
    with pytest.raises(xc.UsageError, match=words):
        xc.Engine(world, np.zeros(3), **own)


def test_filters_must_lie_one_after_the_other(world):
    w = np.zeros((3, 4), np.float32).T
    with pytest.raises(xc.UsageError, match="do not lie one after the other in memory"):
        xc.Engine(world, w, extrapolation="filter")


def test_bias_takes_an_inner_rate_of_zero_beside_filters(world):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(4, 3)
    with pytest.raises(xc.UsageError, match="has no filters"):
        xc.SGD(model.parameters(), extrapolation="filter", world=world)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "inner_lr": 0.0}]
    opt = xc.SGD(groups, lr=0.0, extrapolation="filter", inner_lr=0.1, world=world)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    torch.testing.assert_close(model.bias.detach(), opt.master(1))
    assert not torch.equal(model.weight.detach(), opt.master(0))
    opt.param_groups[1]["inner_lr"] = 0.1
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(xc.UsageError, match="has no filters"):
        opt.step()
    opt.close()


def test_ranks_of_different_seeds_are_a_mismatch(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(xc.MismatchError, match="seed"):
        xc.Engine(world, np.zeros(3), extrapolation="uniform", seed=world.rank)


def test_reference_knows_every_random_kind():
    assert set(RANDOM) <= set(KINDS) and set(RULES) == set(LISTED)


def test_engine_checks_filters_when_the_inner_rate_changes(team):
    engine = xc.Engine(team, np.ones(5), extrapolation="filter", inner_lr=0.0)
    with pytest.raises(xc.UsageError, match="has no filters"):
        engine.step(inner_lr=0.1)
    engine.step()
    engine.close()


def test_filter_whose_random_numbers_are_zero_is_not_displaced(virtual):
    """Of seed 3, element 79927 of worker 0 is zero at the first step."""
    assert noise("gaussian", 3, 1, 0, 79927, 1)[0] == 0
    engine = xc.Engine(
        virtual(1), np.ones((79928, 1), "float32"), extrapolation="filter", inner_lr=0.1, seed=3
    )
    engine.step()
    assert engine.weights[79927] == 1 and np.isfinite(engine.weights).all()
    engine.close()
