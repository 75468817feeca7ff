"""AdamP and SGDP: worked examples, every way to be projected, both sides of the threshold, filters that straddle."""

import numpy as np
import pytest
from conftest import loaded, stored
from reference import ReferenceEngine, assert_same_bits, rounded, tree_mean, turned_view

import extrapcomm as xc

RULES = {
    "adamp": {"weight_decay": 0.02},
    "adamp, nesterov": {"nesterov": True, "betas": (0.8, 0.95), "wd_ratio": 0.3, "weight_decay": 0.02},
    "sgdp": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.02},
    "sgdp, nesterov": {"momentum": 0.9, "nesterov": True, "wd_ratio": 0.3, "weight_decay": 0.02},
}
SHAPES = [(5, 700), (3,), (3, 2, 2, 400), (70, 16), (2, 1300), (0, 4), (33, 2)]  # straddle shards and tiles
LR = 0.1


def tilted(random, w, cosines):
    """A gradient per filter that has this cosine with its weights."""
    rows = w.reshape(len(w), -1).astype("float64")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    across = random.normal(size=rows.shape)
    across -= np.sum(across * unit, axis=1, keepdims=True) * unit
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    c = np.broadcast_to(cosines, len(w)).reshape(-1, 1)
    return (c * unit + np.sqrt(1 - c**2) * across).reshape(w.shape)


def gradient_for(kind, random, w):
    """One under which these weights are projected by filter, as a layer, or not at all."""
    if w.ndim < 2 or not w.size:
        return random.normal(size=w.shape)
    by_filter, lengths = 0.1 / np.sqrt(w[0].size), np.linalg.norm(w.reshape(len(w), -1), axis=1)
    if kind == "filter":
        return tilted(random, w, 0.5 * by_filter)
    if kind is None:
        return tilted(random, w, 0.9)
    # Two filters lean as much towards their weights as away from them, so the layer does neither.
    cosines = np.zeros(len(w))
    cosines[:2] = 3 * by_filter * np.array([1, -lengths[0] / lengths[1]])
    return tilted(random, w, cosines)


class Projected:
    """An engine beside its reference, on gradients whose mean is projected in one way."""

    def __init__(self, world, rule, kind, tile=512, dtype="float32", **options):
        self.random = np.random.default_rng(5)
        self.world, self.dtype, self.kind = world, dtype, kind
        weights = [self.narrowed(self.random.normal(size=shape)) for shape in SHAPES]
        options |= RULES[rule]
        name = rule.partition(",")[0]
        self.engine = xc.Engine(world, [stored(w, dtype) for w in weights], name, tile=tile, **options)
        self.exact = ReferenceEngine(weights, world.K, name, dtype=dtype, **options)

    def narrowed(self, values):
        return rounded(values.astype("float64" if self.dtype == "float64" else "float32"), self.dtype)

    def gradients(self):
        """Of all workers: their mean, and noise that they have no share in."""
        means = [gradient_for(self.kind, self.random, w) for w in self.exact.w]
        K = self.world.K
        noise = [0.1 * self.random.normal(size=(K, *w.shape)) / np.sqrt(max(w.size, 1)) for w in self.exact.w]
        return [
            [self.narrowed(m + n[k] - n.mean(axis=0)) for m, n in zip(means, noise, strict=True)]
            for k in range(K)
        ]

    def step(self):
        grads = self.gradients()
        self.require_kind(grads)
        first = self.world.rank * self.world.workers
        for v, worker in enumerate(self.engine.workers):
            for view, g in zip(worker.grads, grads[first + v], strict=True):
                view[...] = stored(g, self.dtype)
        self.engine.step(lr=LR)
        self.exact.step(grads, lr=LR)
        for w, exact in zip(self.engine.master(), self.exact.w, strict=True):
            assert_same_bits(w, exact)
        for v, worker in enumerate(self.engine.workers):
            for view, x in zip(worker.weights, self.exact.x[first + v], strict=True):
                assert_same_bits(loaded(view), x)

    def require_kind(self, grads):
        for i, w in enumerate(self.exact.w):
            if w.ndim > 1 and w.size:
                mean = tree_mean([of_worker[i].astype(w.dtype) for of_worker in grads])
                h = {"begin": self.exact.begins[i], "eps": 1e-8, "delta": 0.1}
                assert turned_view(w, mean, h) == self.kind


@pytest.mark.parametrize("kind", ["filter", "layer", None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
def test_projection_equals_the_reference(team, rule, kind, dtype):
    p = Projected(team, rule, kind, dtype=dtype, extrapolation="local")
    for _ in range(3):
        p.step()
    p.engine.close()


@pytest.mark.parametrize("tile", [1, 7, 100, 1024, 5000])
@pytest.mark.parametrize("kind", ["filter", "layer"])
@pytest.mark.parametrize("rule", ["adamp", "sgdp, nesterov"])
def test_projection_equals_the_reference_whatever_the_tile(team, rule, kind, tile):
    p = Projected(team, rule, kind, tile=tile, extrapolation="anisotropic")
    p.step()
    p.step()
    p.engine.close()


@pytest.mark.parametrize("rule", ["adamp, nesterov", "sgdp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_projection_of_narrow_weights_and_noise_by_filter(team, rule, dtype):
    """16-bit gradients are too coarse to stay below the threshold of long filters, so it is moved instead."""
    random = np.random.default_rng(1)
    w = rounded(random.normal(size=(6, 450)).astype("float32"), dtype)
    options = {**RULES[rule], "delta": 10.0, "extrapolation": "filter", "inner_lr": 0.1, "tile": 100}
    name = rule.partition(",")[0]
    engine = xc.Engine(team, stored(w, dtype), name, **options)
    exact = ReferenceEngine([w], team.K, name, dtype=dtype, **options)
    grads = [rounded(random.normal(size=w.shape).astype("float32"), dtype) for _ in range(team.K)]
    for v, worker in enumerate(engine.workers):
        worker.grads[...] = stored(grads[team.rank * team.workers + v], dtype)
    engine.step(lr=LR)
    exact.step([[g] for g in grads], lr=LR)
    assert_same_bits(engine.master(), exact.w[0])
    engine.close()


# --- worked examples


EXAMPLE = [[1.0, 2.0, 2.0], [2.0, -1.0, 0.0]]
GRADIENTS = [[[2.0, -1.0, 0.01], [1.0, 2.0, 5.0]], [[1.0, 0.2, -0.3], [0.1, 0.4, 0.2]]]


def train(world, rule, gradients, w=EXAMPLE, dtype="float64", **hyper):
    """The weights after every step, all workers with the same gradient."""
    engine = xc.Engine(world, np.array(w, dtype), rule, **{"lr": LR, **hyper})
    seen = []
    for gradient in gradients:
        for worker in engine.workers:
            worker.grads[...] = gradient
        engine.step()
        seen.append(engine.master())
    engine.close()
    return seen


def test_adamp_example(team):
    """What the authors' code gives (clovaai/AdamP, adamp.py): projected by filter, then not projected."""
    one, two = train(team, "adamp", GRADIENTS, weight_decay=0.01)
    wanted = [[0.9110110895, 2.1220221770, 1.9220222780], [1.9398, -1.1198999990, -0.0999999998]]
    np.testing.assert_allclose(one, wanted, rtol=0, atol=6e-11)
    wanted = [[0.8168821151, 2.1710027618, 1.9922414969], [1.8637791368, -1.1990841963, -0.1698278858]]
    np.testing.assert_allclose(two, wanted, rtol=0, atol=6e-11)


def test_sgdp_example(team):
    """What the authors' code gives (clovaai/AdamP, sgdp.py): projected by filter, then not projected."""
    one, two = train(team, "sgdp", GRADIENTS, weight_decay=0.01, momentum=0.9, nesterov=True)
    wanted = [[0.6194222222, 2.1888444444, 1.9969444444], [1.808, -1.379, -0.95]]
    np.testing.assert_allclose(one, wanted, rtol=0, atol=6e-11)
    wanted = [[0.2441756886, 2.1496984637, 1.9781903522], [1.6401468761, -1.5652469813, -1.3573470865]]
    np.testing.assert_allclose(two, wanted, rtol=0, atol=6e-11)


# --- the threshold


def growth(before, after):
    """The part of every filter's step along its weights, in units of the step."""
    rows, steps = before.reshape(len(before), -1), (after - before).reshape(len(before), -1)
    along = np.sum(rows * steps, axis=1) / np.linalg.norm(rows, axis=1)
    return np.abs(along) / np.linalg.norm(steps, axis=1)


@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
@pytest.mark.parametrize("delta", [0.1, 2.0])
def test_projection_sets_in_below_the_threshold_and_not_above(team, rule, delta):
    random = np.random.default_rng(2)
    w = random.normal(size=(4, 400))
    threshold = delta / np.sqrt(400)
    for cosine in (threshold, -threshold):
        below, above = (tilted(random, w, near * cosine) for near in (1 - 1e-9, 1 + 1e-9))
        assert growth(w, train(team, rule, [below], w, delta=delta)[0]).max() < 1e-8
        assert growth(w, train(team, rule, [above], w, delta=delta)[0]).min() > 1e-4


@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_one_filter_above_the_threshold_keeps_all_from_being_projected(team, rule):
    """It leans so much that the layer as a whole does too."""
    random = np.random.default_rng(2)
    w, cosines = random.normal(size=(4, 400)), np.full(4, 0.001)
    cosines[2] = 0.9
    moved = train(team, rule, [tilted(random, w, cosines)], w)[0]
    assert growth(w, moved).min() > 1e-4


@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_layer_is_projected_as_one_vector_where_its_filters_balance(team, rule):
    random = np.random.default_rng(2)
    w = random.normal(size=(4, 20, 20))
    moved = train(team, rule, [gradient_for("layer", random, w)], w)[0]
    assert growth(w, moved).max() > 1e-3
    assert growth(w.reshape(1, -1), moved.reshape(1, -1))[0] < 1e-8


@pytest.mark.parametrize("rule, strength", [("adamp", 1.0), ("sgdp", 2.0)])
@pytest.mark.parametrize("kind, part", [("filter", 0.25), ("layer", 0.25), (None, 1.0)])
def test_scale_invariant_weights_take_a_part_of_the_decay(team, rule, strength, kind, part):
    """SGDP's is 1 / (1 - momentum) times as strong."""
    random = np.random.default_rng(2)
    w = random.normal(size=(4, 400))
    hyper = {"wd_ratio": 0.25} | ({"momentum": 0.5} if rule == "sgdp" else {})
    gradients = [gradient_for(kind, random, w)]
    plain = train(team, rule, gradients, w, **hyper)[0]
    decayed = train(team, rule, gradients, w, weight_decay=0.3, **hyper)[0]
    np.testing.assert_allclose(plain - decayed, LR * 0.3 * strength * part * w, rtol=1e-9, atol=1e-12)


# --- what has no direction, or no filters


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_filters_of_zeros_move_along_their_update(team, rule, eps):
    """Nothing can be taken away along them; their cosine is 0."""
    w = np.ones((3, 50))
    w[1] = 0
    g = tilted(np.random.default_rng(2), np.ones((3, 50)), 0.0)
    moved = train(team, rule, [g], w, eps=eps)[0]
    step = LR * (np.sign(g[1]) if rule == "adamp" else g[1])
    np.testing.assert_allclose(moved[1], -step, rtol=1e-5)
    assert growth(w[[0, 2]], moved[[0, 2]]).max() < 1e-8


@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_gradients_of_zeros_leave_the_weights_and_take_a_part_of_the_decay(team, rule):
    still = train(team, rule, [np.zeros((2, 3))] * 2)[1]
    assert_same_bits(still, np.array(EXAMPLE))
    shrunk = train(team, rule, [np.zeros((2, 3))], weight_decay=0.5)[0]
    np.testing.assert_allclose(shrunk, np.array(EXAMPLE) * (1 - LR * 0.5 * 0.1), rtol=1e-12)


@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_gradient_that_is_no_number_spoils_its_own_element_only(team, rule):
    g = np.zeros((2, 3))
    g[1, 2] = np.nan
    moved = train(team, rule, [g])[0]
    assert np.flatnonzero(np.isnan(moved)).tolist() == [5]


def test_products_do_not_overflow(world):
    """In float32 the squares would: 1e30 ** 2."""
    moved = train(world, "sgdp", [[[1e30, -1e30]]], [[1e30, 1e30]], "float32")[0]
    np.testing.assert_allclose(moved, [[0.9e30, 1.1e30]], rtol=1e-6)


def test_parameter_of_one_dimension_takes_the_step_of_adamw(team):
    w, g = np.array([3.0, -4.0]), [[4.0, 3.0], [0.5, 0.1]]
    adam = train(team, "adam", g, w, weight_decay=0.1, decoupled_weight_decay=True)
    for mine, wanted in zip(train(team, "adamp", g, w, weight_decay=0.1), adam, strict=True):
        assert_same_bits(mine, wanted)


@pytest.mark.parametrize("kind", ["AdamP", "SGDP"])
def test_optimizer_projects_what_lies_in_channels_last(team, kind):
    torch = pytest.importorskip("torch")
    start = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for memory in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(start.clone(memory_format=memory))
        opt = getattr(xc, kind)([param], lr=0.1, weight_decay=0.1, world=team)
        unit = start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        g = torch.sin(7 * start)
        g -= unit * (unit * g).flatten(1).sum(dim=1).view(-1, 1, 1, 1)
        for v in range(team.workers):
            with opt.worker(v):
                param.grad = g.clone(memory_format=memory)
        opt.step()
        found.append(opt.master(0))
        opt.close()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    shrink = (found[0] * start).flatten(1).sum(dim=1) / (start * start).flatten(1).sum(dim=1)
    torch.testing.assert_close(shrink, torch.full((4,), 1 - 0.1 * 0.1 * 0.1, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_filters_that_do_not_lie_one_after_the_other_are_refused_by_all(world, rule):
    with pytest.raises(
        xc.UsageError, match=rf"one after the other in memory, as rule '{rule}' needs them to project"
    ):
        xc.Engine(world, np.zeros((3, 4), np.float32).T, rule)
    torch = pytest.importorskip("torch")
    kind = {"adamp": xc.AdamP, "sgdp": xc.SGDP}[rule]
    with pytest.raises(xc.UsageError, match=r"its shape is \(4, 3\) and its strides are \(1, 4\)"):
        kind([torch.nn.Parameter(torch.zeros(3, 4).T)], lr=0.1, world=world)


def test_momentum_of_one_on_one_rank_is_an_error_of_all(world):
    torch = pytest.importorskip("torch")
    momentum = 1.0 if world.rank == world.size - 1 else 0.9
    with pytest.raises(xc.UsageError, match="momentum must be below 1, but is 1: rule 'sgdp' divides"):
        xc.SGDP([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, momentum=momentum, world=world)


def test_state_of_the_authors_optimizer_is_taken(world):
    torch = pytest.importorskip("torch")
    param = torch.nn.Parameter(torch.ones(2, 3))
    opt = xc.SGDP([param], lr=0.1, momentum=0.5, world=world)
    state = opt.state_dict()
    state["state"] = {0: {"momentum": torch.full((2, 3), 2.0)}}
    opt.load_state_dict(state)
    param.grad = torch.ones(2, 3)
    opt.step()
    torch.testing.assert_close(opt.master(0), torch.full((2, 3), 1 - 0.1 * (0.5 * 2 + 1)))
    opt.close()
