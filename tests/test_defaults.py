"""torch's global settings, default dtype and device among them, change nothing that an optimizer here does."""

import ast
from contextlib import contextmanager
from pathlib import Path

import factories
import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

SETTINGS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "meta": {"device": "meta"},
    "both": {"dtype": torch.bfloat16, "device": "meta"},
}


@contextmanager
def defaults(dtype=torch.float32, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device="cpu")


def values(count, seed, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=count)).to(dtype)


def parameters(dtype):
    """On the CPU and of this type, whatever the settings."""
    return [torch.nn.Parameter(values(n, n, dtype).view(shape)) for n, shape in ((6, (2, 3)), (4, (4,)))]


def train(opt, params, world, steps=2, seed=0):
    for step in range(steps):
        opt.zero_grad(set_to_none=bool(step % 2))
        for v in range(world.workers):
            with opt.worker(v):
                for i, p in enumerate(params):
                    weight = values(p.numel(), 100 * seed + 10 * step + i, p.dtype).view(p.shape)
                    (p.sin() * weight).sum().backward()
        opt.step()


def same(left, right):
    """Equal in type, device and bits, in whatever structure."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


OPTIMIZERS = {
    "SGD": (xc.SGD, {"lr": 0.1, "momentum": 0.9}),
    "ExtrapSGD": (xc.ExtrapSGD, {"lr": 0.1, "momentum": 0.9, "gradients": "hook"}),
    "Adam": (xc.Adam, {"lr": 0.1, "gradients": "view"}),
    "LAMB": (xc.LAMB, {"lr": 0.1, "max_grad_norm": 0.5}),
    "AdamP": (xc.AdamP, {"lr": 0.1}),
    "EG": (xc.EG, {"lr": 0.1}),
    "random": (xc.SGD, {"lr": 0.1, "extrapolation": "gaussian", "inner_lr": 0.1}),
}


def life(world, make, options, dtype):
    """All that an optimizer does, and what comes of it."""
    params = parameters(dtype)
    opt = make(params, world=world, **options)
    train(opt, params, world)
    state, local = opt.state_dict(), opt.local_state_dict()
    opt.close()

    again = parameters(dtype)
    opt = make(again, world=world, **options)
    opt.load_state_dict(state)
    train(opt, again, world, seed=1)
    opt.load_local_state_dict(local)
    extra = torch.nn.Parameter(values(5, 5, dtype))
    opt.add_param_group({"params": [extra]})
    train(opt, [*again, extra], world, seed=2)
    with torch.no_grad():
        again[0].mul_(0.5)
    opt.adopt()
    with opt.master_weights(write=True), torch.no_grad():
        again[0].mul_(0.5)
    train(opt, [*again, extra], world, seed=3)
    results = [
        state,
        local,
        opt.state_dict(),
        [p.detach().clone() for p in again],
        opt.master(0),
        opt.grad_norm,
    ]
    opt.close()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_have_the_same_bits_under_any_settings(world, setting, kind, dtype):
    make, options = OPTIMIZERS[kind]
    expected = life(world, make, options, dtype)
    with defaults(**setting):
        found = life(world, make, options, dtype)
    assert same(found, expected)


def test_optimizer_of_several_workers_has_the_same_bits(worlds, setting):
    world = worlds(2)
    options = {"lr": 0.1, "momentum": 0.9, "inner_lr": "noise"}
    expected = life(world, xc.ExtrapSGD, options, torch.float32)
    with defaults(**setting):
        assert same(life(world, xc.ExtrapSGD, options, torch.float32), expected)


@pytest.mark.parametrize("count", [301, 70001])
def test_step_counts_are_saved_exactly(world, setting, count):
    with defaults(**setting):
        params = parameters(torch.float32)
        opt = xc.Adam(params, lr=0.1, world=world)
        train(opt, params, world, steps=1)
        state = opt.state_dict()
        for entry in state["state"].values():
            entry["step"] = tensor(float(count))
        opt.load_state_dict(state)
        train(opt, params, world, steps=1)
        assert [float(e["step"]) for e in opt.state_dict()["state"].values()] == [count + 1.0] * 2
        opt.close()


def test_states_go_to_torch_and_come_back(world, setting):
    with defaults(**setting):
        params, theirs = parameters(torch.float32), parameters(torch.float32)
        opt, other = xc.Adam(params, lr=0.1, world=world), torch.optim.Adam(theirs, lr=0.1)
        train(opt, params, world)
        other.load_state_dict(opt.state_dict())
        for p in theirs:
            p.grad = torch.ones_like(p)
        other.step()
        opt.load_state_dict(other.state_dict())
        train(opt, params, world)
        assert all(p.isfinite().all() for p in params)
        opt.close()


@pytest.mark.parametrize("overflow", [False, True])
def test_scaler_scales_skips_and_updates(world, setting, overflow):
    with defaults(**setting):
        params = parameters(torch.float32)
        opt = xc.SGD(params, lr=0.1, world=world)
        scaler = xc.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        before = opt.master(0)
        loss = (params[0] * (float("inf") if overflow else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == (4.0 if overflow else 16.0)
        assert torch.equal(opt.master(0), before) == overflow
        opt.close()


def test_attached_models_save_and_load(world, setting):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with defaults(**setting):
        opt = xc.ExtrapSGD(model.parameters(), lr=0.1, world=world)
        opt.attach(model)
        train(opt, list(model.parameters()), world)
        saved = model.state_dict()
        assert all(
            torch.equal(saved[name], opt.master(i)) for i, (name, _) in enumerate(model.named_parameters())
        )
        train(opt, list(model.parameters()), world)
        model.load_state_dict(saved)
        for how in ("broadcast", "average"):
            opt.sync_buffers(model, how)
        train(opt, list(model.parameters()), world)
        opt.close()
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in model.parameters())


def test_micro_batches_are_measured(virtual, setting):
    def gain_of():
        params = parameters(torch.float32)
        opt = xc.SGD(params, lr=0.1, world=virtual(1), gain=xc.AdaScale())
        for step in range(2):
            opt.zero_grad()
            with opt.no_sync():
                (params[0] * values(6, 2 * step).view(2, 3)).sum().backward()
            (params[0] * values(6, 2 * step + 1).view(2, 3)).sum().backward()
            opt.step()
        found = opt.gain, opt.progress, opt.state_dict()
        opt.close()
        return found

    expected = gain_of()
    with defaults(**setting):
        assert same(gain_of(), expected)


def test_local_steps_have_the_same_bits(world, setting):
    def weights_of():
        params = parameters(torch.float32)
        opt = xc.PostLocalSGD(params, lr=0.1, momentum=0.9, world=world, local_steps=2, start=1)
        train(opt, params, world, steps=5)
        opt.average()
        state = opt.state_dict()
        opt.close()
        return state

    expected = weights_of()
    with defaults(**setting):
        assert same(weights_of(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_on_tensors_have_the_same_bits(world, setting, dtype):
    def weights_of():
        engine = xc.Engine(world, {"w": values(6, 0, dtype)}, rule="adam", lr=0.1)
        for seed in range(3):
            engine.grads["w"].copy_(values(6, seed, dtype))
            engine.step()
        found = [engine.weights["w"].clone(), torch.from_numpy(engine.master()["w"].copy())]
        engine.close()
        return found

    expected = weights_of()
    with defaults(**setting):
        assert same(weights_of(), expected)


# -- The check of the sources ----------------------------------------------------------------------------------------


def test_package_has_no_bare_factory():
    assert factories.in_folder(Path(xc.__file__).parent) == []


BARE = {
    "torch.zeros(3)": "dtype and device",
    "torch.empty((2, 3), dtype=torch.float32)": "give it device",
    "torch.tensor(1.0, device='cpu')": "give it dtype",
    "x = [torch.full((), 1.0) for _ in y]": "dtype and device",
    "torch.Tensor(3)": "global settings",
    "from torch import zeros": "by this name",
    "def f(): return torch.arange(n)": "dtype and device",
}


@pytest.mark.parametrize("line", BARE)
def test_bare_factories_are_found(line):
    assert [BARE[line] in text for _, text in factories.complaints(ast.parse(line))] == [True]


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3, dtype=d, device='cpu')",
        "torch.zeros_like(p)",
        "p.new_zeros(3)",
        "np.zeros(3)",
        "torch.from_numpy(a)",
        "from torch import nn",
    ],
)
def test_factories_that_say_what_they_make_are_well(line):
    assert list(factories.complaints(ast.parse(line))) == []
