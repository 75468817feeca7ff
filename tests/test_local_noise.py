"""inner_lr="noise": its measure, and that it is as good as the better preset where displacement matters."""

import math

import numpy as np
import pytest

import extrapcomm as xc
from extrapcomm.local_noise import LocalNoise

D = 30
CURVATURE = np.logspace(-0.7, 0, D)


def sums_of(gradients):
    mean = np.mean(gradients, axis=0)
    return [float(mean @ mean), float(np.sum(np.square(gradients)))]


def test_noise_is_variance_over_signal_and_at_most_one():
    """Two workers: variance 2 d^2 of +-d around a mean of m, whose square loses half of that."""
    for d, m, wanted in ((3.0, 1.0, 1.0), (0.1, 1.0, 0.02 / 0.99), (0.0, 1.0, 0.0)):
        noise = LocalNoise(2)
        noise.take(sums_of(np.array([[m + d], [m - d]])))
        assert noise.coefficient == pytest.approx(wanted, rel=1e-12)


def test_noise_begins_with_one_over_k_and_passes_over_what_measures_nothing():
    noise = LocalNoise(4)
    for sums in ([0.0, 0.0], [math.inf, math.inf], [math.nan, math.nan]):
        noise.take(sums)
        assert noise.coefficient == 0.25


def ripples(world, inner_lr, seed):
    """The final f of the rippled quadratic f = sum of curvature w^2 / 2 + 0.3 (1 - cos 8 w), gradients with noise."""
    random = np.random.default_rng(seed)
    options = {"momentum": 0.9, "nesterov": True, "extrapolation": "local", "inner_lr": inner_lr}
    engine = xc.Engine(world, 3 * random.normal(size=D), **options)
    for t in range(300):
        noise = 2 * random.normal(size=(world.K, D))
        for worker, own in zip(engine.workers, noise, strict=True):
            w = worker.weights
            worker.grads[:] = CURVATURE * w + 2.4 * np.sin(8 * w) + own
        engine.step(lr=0.08 if t < 225 else 0.008)
    w = engine.master()
    engine.close()
    return np.sum(CURVATURE * w**2) / 2 + 0.3 * np.sum(1 - np.cos(8 * w))


def test_noise_is_as_good_as_the_better_preset_on_ripples(virtual):
    """Mean of twelve seeds at K = 32, lr .08; "lr" is the better preset there by far.

    The sines of two processors differ in their last bits, and the runs are chaotic: over 24 seeds a run's result is
    0.41 +- 0.17 with "lr" and 0.43 +- 0.22 with "noise", so their ratio is 1.0 +- 0.2 for twelve.
    """
    found = {
        rate: np.mean([ripples(virtual(32), rate, seed) for seed in range(12)])
        for rate in ("lr", "lr/K", "noise")
    }
    assert found["noise"] < 2 * found["lr"] < 0.2 * found["lr/K"]


def test_without_noise_the_displacement_goes_away(team):
    """All workers agree, so that displacing would only cost stability."""
    if team.K == 1:
        pytest.skip("one worker has no noise to measure")
    engine = xc.Engine(team, np.ones(10), extrapolation="local", inner_lr="noise", lr=0.1)
    for _ in range(2):
        for worker in engine.workers:
            worker.grads[:] = np.arange(10.0)
        engine.step()
    np.testing.assert_allclose(engine.weights, engine.master(), rtol=0, atol=1e-12)
    engine.close()


def test_noise_of_both_optimizer_and_engine_is_the_same_and_in_checkpoints(world):
    torch = pytest.importorskip("torch")
    if world.K == 1:
        pytest.skip("one worker has no noise to measure")

    def train(opt, param, steps):
        for t in steps:
            param.grad = torch.sin(torch.arange(20.0) + 0.3 * t) + 0.1 * (world.rank + 1)
            opt.step()

    def make():
        param = torch.nn.Parameter(torch.ones(20))
        return param, xc.ExtrapSGD([param], lr=0.1, inner_lr="noise", world=world)

    param, opt = make()
    train(opt, param, range(3))
    saved = opt.state_dict()
    train(opt, param, range(3, 5))
    whole, coefficient = param.detach().clone(), opt._rule.local_noise.coefficient
    opt.close()
    param, opt = make()
    opt.load_state_dict(saved)
    train(opt, param, range(3, 5))
    assert torch.equal(param.detach(), whole)
    assert 0 < opt._rule.local_noise.coefficient == coefficient < 1
    opt.close()


def test_one_worker_has_no_noise(virtual):
    with pytest.raises(xc.UsageError, match="at least two workers"):
        xc.Engine(virtual(1), np.ones(3), extrapolation="local", inner_lr="noise")
