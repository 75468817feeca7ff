"""VRGD: worked example, gradients that do not vary, the mean of the step before, wrong values."""

import numpy as np
import pytest
from reference import ReferenceEngine, assert_same_bits

import extrapcomm as xc

PLAIN = {"vrsgd": "sgd", "vradam": "adam", "vrlars": "lars", "vrlamb": "lamb"}
EXAMPLE = [[1, 0.5, -0.2], [1.2, -0.5, 0.1], [0.8, 0.4, 0.3], [1, -0.2, -0.1]]


def engine_of_example(virtual, dtype="float64", factor=1.0, **options):
    engine = xc.Engine(virtual(4), np.zeros(3, dtype), lr=1.0, **options)
    for worker, gradient in zip(engine.workers, EXAMPLE, strict=True):
        worker.grads[:] = np.array(gradient) * factor
    return engine


def test_example_of_four_devices(virtual):
    """By hand from arXiv:2309.13681: ratios (50, .0145, .0169), over their mean (2.998, 8.7e-4, 1e-3), clipped."""
    engine = engine_of_example(virtual, rule="vrsgd")
    engine.step()
    np.testing.assert_allclose(engine.master(), [-1, -0.005, -0.0025], rtol=1e-12)
    engine.close()


def test_floor_of_zero_shows_the_ratios_themselves(virtual):
    """The same example, not clipped from below."""
    engine = engine_of_example(virtual, rule="vrsgd", gsnr_floor=0.0)
    engine.step()
    wanted = [-1, -0.05 * 8.69036e-4, -0.025 * 1.016331e-3]
    np.testing.assert_allclose(engine.master(), wanted, rtol=1e-4)
    engine.close()


@pytest.mark.parametrize("factor", [1e-15, 1e15, 1e30])
def test_ratios_do_not_depend_on_the_scale_of_gradients(virtual, factor):
    """In float32 the squares of 1e30 are infinite."""
    engine = engine_of_example(virtual, "float32", factor, rule="vrsgd", max_grad_norm=1e-3)
    engine.step()
    moved = engine.master()
    np.testing.assert_allclose(moved / moved[0], [1, 0.005, 0.0025], rtol=1e-4)
    engine.close()


@pytest.mark.parametrize("rule", PLAIN)
def test_without_variance_the_rule_is_the_plain_one(team, rule):
    """All workers have the same gradient, with zeros in it; and a single worker has no other case."""
    ours = xc.Engine(team, np.ones(100), rule, lr=0.1)
    plain = xc.Engine(team, np.ones(100), PLAIN[rule], lr=0.1)
    for step in range(3):
        gradient = np.sin(np.arange(100.0) + step)
        gradient[:7] = 0
        for engine in (ours, plain):
            for worker in engine.workers:
                worker.grads[:] = gradient
            engine.step()
    np.testing.assert_allclose(ours.master(), plain.master(), rtol=2e-2 if rule == "vradam" else 1e-2)
    ours.close()
    plain.close()


@pytest.mark.parametrize("rule", PLAIN)
def test_zero_gradients_and_zero_weights_give_no_nan(team, rule):
    engine = xc.Engine(team, np.zeros(50, np.float32), rule, lr=0.1)
    engine.step()
    assert_same_bits(engine.master(), np.zeros(50, np.float32))
    for k, worker in enumerate(engine.workers):
        worker.grads[:] = (-1.0) ** np.arange(50) * (1 + k + team.rank)
    engine.step()
    assert np.isfinite(engine.master()).all() and engine.master().any()
    engine.close()


def test_mean_of_the_step_before_is_forgotten_with_a_checkpoint(world):
    """The first step after loading measures again, as the first step of all."""
    torch = pytest.importorskip("torch")
    param = torch.nn.Parameter(torch.ones(20))
    opt = xc.VRSGD([param], lr=0.1, layer_mean="last", world=world)
    for scale in (1.0, 5.0):
        param.grad = scale * torch.arange(20.0) * (1 + 0.1 * world.rank)
        opt.step()
    saved = opt.state_dict()
    results = []
    for _ in range(2):
        opt.load_state_dict(saved)
        param.grad = torch.cos(torch.arange(20.0) + 0.1 * world.rank)
        opt.step()
        results.append(opt.master(0))
    assert_same_bits(results[0].numpy(), results[1].numpy())
    opt.close()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"gsnr_floor": 1.5}, "gsnr_floor must not be above 1"),
        ({"gsnr_floor": -0.1}, "gsnr_floor must not be negative"),
        ({"gsnr_eps": 0.0}, "gsnr_eps must be positive"),
        ({"layer_mean": "then"}, "layer_mean must be one of now, last, not 'then'"),
    ],
)
def test_wrong_values_are_refused_by_all(world, wrong, words):
    torch = pytest.importorskip("torch")
    own = wrong if world.rank == world.size - 1 else {}
    with pytest.raises(xc.UsageError, match=words):
        xc.VRSGD([torch.nn.Parameter(torch.ones(2))], world=world, **own)


def test_third_beta_is_of_the_ratio(world):
    torch = pytest.importorskip("torch")
    for kind in (xc.VRAdam, xc.VRLAMB):
        opt = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1, world=world)
        assert opt.param_groups[0]["betas"] == (0.9, 0.999, 0.9)
        opt.close()
        with pytest.raises(xc.UsageError, match="betas must be numbers, 3 of them"):
            kind([torch.nn.Parameter(torch.ones(2))], betas=(0.9, 0.999), world=world)


LAYERS = [40, 50]


class Lagged:
    """Layers of which some may have no gradient, beside the reference."""

    def __init__(self, world, **options):
        torch = pytest.importorskip("torch")
        self.random = np.random.RandomState(0)
        weights = [self.random.uniform(-1, 1, n) for n in LAYERS]
        self.params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
        self.opt = xc.VRSGD(self.params, lr=0.1, layer_mean="last", gsnr_floor=0.0, world=world, **options)
        hyper = {"lr": 0.1, "lagged_mean": True, "gsnr_floor": 0.0}
        self.exact = ReferenceEngine(weights, world.K, "vrsgd", **hyper)

    def step(self, present):
        grads = [
            [self.random.uniform(0.1, 1, n) if i in present else None for i, n in enumerate(LAYERS)]
            for _ in range(self.opt.world.K)
        ]
        world = self.opt.world
        for v in range(world.workers):
            with self.opt.worker(v):
                for param, g in zip(self.params, grads[world.rank * world.workers + v], strict=True):
                    param.grad = None if g is None else param.new_tensor(g)
        self.opt.step()
        self.exact.step(grads)
        for i, w in enumerate(self.exact.w):
            assert_same_bits(self.opt.master(i).numpy(), w)

    def forget(self):
        self.opt.load_state_dict(self.opt.state_dict())
        self.exact.memory = [{} for _ in LAYERS]


def test_layer_that_comes_later_is_measured_and_the_others_remember(team):
    pair = Lagged(team)
    for present in ([0], [0], [0, 1], [1], [0, 1]):
        pair.step(present)
    pair.opt.close()


def test_layer_without_a_gradient_after_loading_is_forgotten_too(team):
    pair = Lagged(team)
    pair.step([0, 1])
    pair.forget()
    for present in ([0], [0, 1], [0, 1]):
        pair.step(present)
    pair.opt.close()


def test_only_groups_that_ask_for_it_take_the_last_mean(team):
    torch = pytest.importorskip("torch")

    def trained(neighbour_lags):
        random = np.random.RandomState(1)
        params = [torch.nn.Parameter(torch.ones(40, dtype=torch.float64)) for _ in range(2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "lagged_mean": neighbour_lags}]
        opt = xc.VRSGD(groups, lr=0.1, gsnr_floor=0.0, world=team)
        for _ in range(3):
            grads = random.uniform(0.1, 1, (team.K, 2, 40))
            for v in range(team.workers):
                with opt.worker(v):
                    for param, g in zip(params, grads[team.rank * team.workers + v], strict=True):
                        param.grad = torch.tensor(g)
            opt.step()
        result = opt.master(0).numpy()
        opt.close()
        return result

    assert_same_bits(trained(True), trained(False))


def test_tiny_ratios_beside_a_gradient_of_zero_give_no_nan(virtual):
    """The layer's mean ratio is 1e-38 / 100, whose inverse is beyond float32."""
    engine = xc.Engine(virtual(4), np.ones(100, np.float32), "vrsgd", lr=0.1)
    for worker, gradient in zip(engine.workers, [2e18, -2e18, 1, 0], strict=True):
        worker.grads[0] = gradient
    engine.step()
    assert np.isfinite(engine.master()).all()
    engine.close()
