"""EG: the worked example, its scale in checkpoints, and exponents that would be too large."""

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

EXAMPLE = {"lr": 0.1, "momentum": 0.9, "smoothing": 0.9, "lr_gain": 0.5, "lr_scale": 0.5}
GRADIENTS = [(1.0, -1.0), (0.5, 1.0), (0.4, 0.9)]
WEIGHTS = [(0.9, -0.9), (0.762222108, -0.904996457), (0.591961980, -0.996108910)]
SCALES = [1.0, 0.975309912, 1.005573952]


def step(opt, param, gradient):
    for v in range(opt.world.workers):
        with opt.worker(v):
            param.grad = torch.tensor(gradient, dtype=param.dtype)
    opt.step()


def test_example(team):
    """Three steps by hand from arXiv:2202.00145; the scale revises itself."""
    param = torch.nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    opt = xc.EG([param], **EXAMPLE, world=team)
    for gradient, weights, scale in zip(GRADIENTS, WEIGHTS, SCALES, strict=True):
        step(opt, param, gradient)
        np.testing.assert_allclose(opt.master(0), weights, rtol=1e-8)
        np.testing.assert_allclose(opt.param_groups[0]["scale"], scale, rtol=1e-8)
    opt.close()


def test_example_by_the_engine(team):
    engine = xc.Engine(team, np.array([1.0, -1.0]), "eg", **EXAMPLE)
    for gradient, weights in zip(GRADIENTS, WEIGHTS, strict=True):
        for worker in engine.workers:
            worker.grads[:] = gradient
        engine.step()
        np.testing.assert_allclose(engine.master(), weights, rtol=1e-8)
    engine.close()


def test_two_groups_have_one_agreement_and_their_own_rates(team):
    """The same example, an element in each group; a group with lr_scale=0 keeps its scale."""
    params = [torch.nn.Parameter(torch.tensor([w], dtype=torch.float64)) for w in (1.0, -1.0)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr_scale": 0.0}]
    opt = xc.EG(groups, **EXAMPLE, world=team)
    for gradient in GRADIENTS:
        for v in range(team.workers):
            with opt.worker(v):
                for param, g in zip(params, gradient, strict=True):
                    param.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
    np.testing.assert_allclose(opt.master(0)[0], WEIGHTS[-1][0], rtol=1e-8)
    np.testing.assert_allclose([group["scale"] for group in opt.param_groups], [SCALES[-1], 1.0], rtol=1e-8)
    opt.close()


def test_checkpoint_continues_the_scale(world):
    param = torch.nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    opt = xc.EG([param], **EXAMPLE, world=world)
    for gradient in GRADIENTS[:2]:
        step(opt, param, gradient)
    saved = opt.state_dict()
    opt.close()
    other = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = xc.EG([other], **EXAMPLE, world=world)
    opt.load_state_dict(saved)
    step(opt, other, GRADIENTS[2])
    np.testing.assert_allclose(opt.master(0), WEIGHTS[-1], rtol=1e-8)
    opt.close()


def test_skipped_step_keeps_the_scale(world):
    param = torch.nn.Parameter(torch.ones(2))
    opt = xc.EG([param], **EXAMPLE, skip_nonfinite=True, world=world)
    step(opt, param, (1.0, 1.0))
    step(opt, param, (np.inf, 1.0))
    assert opt.skipped and opt.param_groups[0]["scale"] == 1.0
    opt.close()


def test_no_step_multiplies_a_gain_by_more_than_e(world):
    """Gradients of 1e15 would overflow both exponentials; they are clipped for the momentum's sake only."""
    param = torch.nn.Parameter(torch.ones(2))
    opt = xc.EG([param], lr=1e-20, lr_gain=0.5, lr_scale=0.5, world=world)
    for _ in range(3):
        step(opt, param, (1e15, -1e15))
    assert torch.isfinite(opt.master(0)).all()
    assert 1 < opt.param_groups[0]["scale"] <= np.exp(2) * (1 + 1e-12)
    opt.close()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"smoothing": 1.0}, "smoothing must be below 1"),
        ({"lr_gain": -1.0}, "lr_gain must not be negative"),
        ({"scale": float("inf")}, "scale must be finite"),
    ],
)
def test_wrong_values_are_refused_by_all(world, wrong, words):
    own = wrong if world.rank == world.size - 1 else {}
    with pytest.raises(xc.UsageError, match=words):
        xc.EG([torch.nn.Parameter(torch.ones(2))], world=world, **own)


def test_step_without_any_gradient_changes_nothing(team):
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = xc.EG([param], **EXAMPLE, world=team)
    opt.step()
    np.testing.assert_array_equal(opt.master(0), np.ones(4))
    assert opt.param_groups[0]["scale"] == 1.0
    step(opt, param, [1.0, -1.0, 1.0, 1.0])
    assert opt.master(0)[0] < 1
    opt.close()
