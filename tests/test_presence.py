"""A parameter without gradient: untouched if no worker has one, zeros where only some have."""

import numpy as np
import pytest
from mpi4py import MPI
from reference import ReferenceEngine, assert_same_bits

import extrapcomm as xc

torch = pytest.importorskip("torch")

OPTIONS = {
    "SGD": ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": ("adam", {"lr": 0.1, "weight_decay": 0.01}),
}


KINDS = [
    (kind, extrapolation)
    for kind, (rule, _) in OPTIONS.items()
    for extrapolation in ("none", "local", "global", "anisotropic")
]
PATTERNS = {
    "never": lambda step, k, K: False,
    "on even workers": lambda step, k, K: k % 2 == 0,
    "on the last worker": lambda step, k, K: k == K - 1,
    "from the third step": lambda step, k, K: step >= 2,
    "on odd steps and even workers": lambda step, k, K: step % 2 == 1 and k % 2 == 0,
}


def run(world, kind, pattern, extrapolation, steps=5):
    """Trains two parameters, the second with a gradient only where the pattern says; compares every step."""
    rule, hyper = OPTIONS[kind]
    random = np.random.default_rng(3)
    initial = [random.normal(size=n).astype("float32") for n in (1500, 700)]
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in initial]
    opt = getattr(xc, kind)(params, extrapolation=extrapolation, world=world, **hyper)
    twin = ReferenceEngine(initial, world.K, rule, extrapolation, dtype="float32", **hyper)
    for step in range(steps):
        grads = [[random.normal(size=len(w)).astype("float32") for w in initial] for _ in range(world.K)]
        for k in range(world.K):
            grads[k][1] = grads[k][1] if PATTERNS[pattern](step, k, world.K) else None
        opt.zero_grad()
        for v, k in own(world):
            with opt.worker(v):
                for p, g in zip(params, grads[k], strict=True):
                    p.grad = None if g is None else torch.from_numpy(g)
        opt.step()
        twin.step(grads)
        compare(world, opt, params, twin)
    opt.close()
    return initial, twin


def own(world):
    return [(v, world.rank * world.workers + v) for v in range(world.workers)]


def compare(world, opt, params, twin):
    for v, k in own(world):
        with opt.worker(v):
            for p, x in zip(params, twin.x[k], strict=True):
                assert_same_bits(p.detach().numpy(), x, f"weights of worker {k}")
    with opt.master_weights():
        for p, w in zip(params, twin.w, strict=True):
            assert_same_bits(p.detach().numpy(), w, "master weights")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind, extrapolation", KINDS)
def test_step_follows_the_presence_of_gradients(team, kind, pattern, extrapolation):
    run(team, kind, pattern, extrapolation)


@pytest.mark.parametrize("kind", OPTIONS)
def test_parameter_without_any_gradient_is_untouched(team, kind):
    initial, twin = run(team, kind, "never", "none")
    assert_same_bits(twin.w[1], initial[1])
    assert twin.t == [5, 0]


@pytest.mark.parametrize("kind", OPTIONS)
def test_zero_gradients_are_gradients(team, kind):
    """A zero moves the weights by decay and momentum; None does not."""
    _, hyper = OPTIONS[kind]
    p = torch.nn.Parameter(torch.ones(10))
    opt = getattr(xc, kind)([p], world=team, **hyper)
    for v in range(team.workers):
        with opt.worker(v):
            p.grad = torch.zeros(10)
    opt.step()
    with opt.master_weights():
        assert (p != 1).all()
    opt.close()


@pytest.mark.parametrize("kind", OPTIONS)
def test_step_without_any_gradient_changes_nothing(team, kind):
    _, hyper = OPTIONS[kind]
    p = torch.nn.Parameter(torch.arange(10.0))
    opt = getattr(xc, kind)([p], world=team, **hyper)
    opt.zero_grad()
    opt.step()
    with opt.master_weights():
        assert_same_bits(p.detach().numpy(), np.arange(10, dtype="float32"))
    opt.close()


def test_gradients_that_were_dropped_do_not_come_back():
    """Backward in a worker, zero_grad, then a step to which the worker brings nothing."""
    with xc.World(MPI.COMM_SELF, workers=2) as world:
        w = torch.nn.Parameter(torch.zeros(3))
        opt = xc.SGD([w], lr=1.0, world=world)
        with opt.worker(1):
            (w.sum() * 1000).backward()
        opt.zero_grad()
        (w.sum() * 0).backward()
        opt.step()
        assert w.tolist() == [0, 0, 0]
        opt.close()
