"""What extrapolation does: it smooths ripples by the workers' own noise, and it shrinks the stable range."""

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

K, LR, SEEDS, STEPS = 32, 0.08, 10, 300
CURVATURE = np.logspace(-0.7, 0, 30)


def rippled(w):
    """f for each row of w: a bowl with ripples of wavelength 0.8."""
    return (0.5 * CURVATURE * w**2 + 0.3 * (1 - np.cos(8 * w))).sum(axis=-1)


def slope(w):
    return CURVATURE * w + 2.4 * np.sin(8 * w)


def final(world, extrapolation, c):
    """Mean of f over the seeds (the rows of one parameter) after training with inner_lr = c * lr."""
    random = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.from_numpy(3 * random.normal(size=(SEEDS, 30))))
    how = {"extrapolation": extrapolation, "inner_lr": lambda lr: c * lr}
    opt = xc.SGD([p], LR, momentum=0.9, nesterov=True, world=world, **how)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, [225], 0.1)
    for _ in range(STEPS):
        noise = 2 * random.normal(size=(K, SEEDS, 30))
        for v in range(K):
            with opt.worker(v):
                p.grad = torch.from_numpy(slope(p.detach().numpy()) + noise[v])
        opt.step()
        scheduler.step()
    with opt.master_weights():
        f = rippled(p.detach().numpy()).mean()
    opt.close()
    return f


@pytest.fixture(scope="module")
def finals(virtual):
    kinds = {"none": ("none", 0), "1/K": ("local", 1 / K), "local": ("local", 1), "global": ("global", 1)}
    return {name: final(virtual(K), *how) for name, how in kinds.items()}


def test_local_extrapolation_smooths_the_ripples(finals):
    assert finals["local"] < 0.2 * finals["none"]


def test_one_shared_displacement_does_not(finals):
    assert finals["global"] > 5 * finals["local"]


def test_displacements_of_lr_over_K_change_little(finals):
    assert 0.5 * finals["none"] < finals["1/K"] < 1.5 * finals["none"]


def shrinks(world, step_size, c, **momentum):
    """Whether w decays on f = w^2/2, where the learning rate is the whole of gamma*h."""
    how = {"extrapolation": "local", "inner_lr": lambda lr: c * lr}
    engine = xc.Engine(world, np.ones(1), lr=step_size, **how, **momentum)
    with np.errstate(all="ignore"):
        for _ in range(1500):
            for worker in engine.workers:
                worker.grads[...] = worker.weights
            engine.step()
    w = abs(engine.master()[0])
    engine.close()
    return w < 1


@pytest.mark.parametrize("c", [0, 1 / 4, 1 / 2, 1, 2])
def test_plain_steps_are_stable_up_to_two_over_one_plus_two_c(team, c):
    limit = 2 / (1 + 2 * c)
    assert shrinks(team, 0.99 * limit, c)
    assert not shrinks(team, 1.01 * limit, c)


@pytest.mark.parametrize("c, limit", [(0, 1.357), (1 / 4, 1.013), (1 / 2, 0.808), (1, 0.576)])
def test_nesterov_steps_are_stable_up_to_the_known_limits(team, c, limit):
    assert shrinks(team, 0.99 * limit, c, momentum=0.9, nesterov=True)
    assert not shrinks(team, 1.01 * limit, c, momentum=0.9, nesterov=True)
