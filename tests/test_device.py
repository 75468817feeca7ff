"""Engines on a device: the kernels' bodies, run by the host in a GPU's place, have the CPU's bits."""

import os
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
from conftest import ALONE, COMM
from reference import assert_same_bits

import extrapcomm as xc
from extrapcomm import device
from extrapcomm.placement import gpu_warnings, sharing_warning

torch = pytest.importorskip("torch")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTHS = (5, 1500, 64)  # one shorter than a cell, one over the edge of one
STEPS = 3

# Every rule that has kernels, in each of its members, with numbers that let all its terms act.
RULES = {
    "plain SGD": {"rule": "sgd", "lr": 0.1},
    "Nesterov": {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "dampening": {
        "rule": "sgd",
        "momentum": 0.8,
        "dampening": 0.3,
        "lr": 0.1,
        "decoupled_weight_decay": True,
    },
    "Adam": {"rule": "adam", "lr": 1e-2, "weight_decay": 1e-2},
    "AdamW": {"rule": "adam", "lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "AMSGrad, maximized": {"rule": "adam", "lr": 1e-2, "amsgrad": True, "maximize": True},
    "LARS": {"rule": "lars", "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3},
    "LARS, trust outside": {"rule": "lars", "lr": 0.5, "momentum": 0.9, "trust_outside": True},
    "CLARS": {"rule": "clars", "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3},
    "LAMB": {"rule": "lamb", "lr": 1e-2, "weight_decay": 1e-2},
    "LANS": {"rule": "lans", "lr": 1e-2, "weight_decay": 1e-2},
    "EG": {"rule": "eg", "lr": 0.1, "momentum": 0.9},
}
KINDS = ("none", "local", "global", "anisotropic", "gaussian", "uniform")[:: 1 if COMM.size == 1 else 2]
WORKERS = (1, 2, 3, 4, 8, 9) if len(ALONE) > 2 and COMM.size == 1 else (1,)
SETTINGS = {
    "clipping": {"max_grad_norm": 0.5},
    "skipping": {"skip_nonfinite": True},
    "AdaScale": {"gain": 0},
    "AdaScale, lagging": {"gain": 1},
    "noise": {"extrapolation": "local", "inner_lr": "noise"},
}


@contextmanager
def on_the_host_device():
    before = os.environ.get("XC_DEVICE")
    os.environ["XC_DEVICE"] = "host"
    try:
        yield
    finally:
        os.environ.pop("XC_DEVICE")
        if before is not None:
            os.environ["XC_DEVICE"] = before


@contextmanager
def on_the_cpu():
    before = os.environ.pop("XC_DEVICE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["XC_DEVICE"] = before


class Twins:
    """The same engine on a device and on the CPU, fed with the same gradients."""

    def __init__(self, world, dtype, gain=None, **options):
        self.world, self.dtype, self.random = world, DTYPES[dtype], np.random.default_rng(0)
        weights = self.values()
        self.engines = []
        for where in (on_the_host_device, on_the_cpu):
            with where():
                options["gain"] = None if gain is None else xc.AdaScale(lag=gain)
                self.engines.append(xc.Engine(world, weights, **options))
        assert [engine._core.device for engine in self.engines] == ["host", None]

    def values(self):
        draws = [self.random.normal(size=n).astype(np.float32) for n in LENGTHS]
        return [torch.from_numpy(values).to(self.dtype) for values in draws]

    def step(self, spoil=False, **hyper):
        of_all = [self.values() for _ in range(self.world.K)]
        if spoil:
            of_all[-1][1][7] = float("inf")
        first = self.world.rank * self.world.workers
        for engine in self.engines:
            mine = of_all[first : first + self.world.workers]
            for worker, values in zip(engine.workers, mine, strict=True):
                for grad, its in zip(worker.grads, values, strict=True):
                    grad.copy_(its)
            engine.step(**hyper)

    def require_same_bits(self):
        device, cpu = self.engines
        for mine, its in zip(device.master(), cpu.master(), strict=True):
            assert_same_bits(mine, its, "master weights")
        for there, here in zip(device.workers, cpu.workers, strict=True):
            for mine, its in zip(there.weights, here.weights, strict=True):
                assert_same_bits(mine.float().numpy(), its.float().numpy(), "published weights")
        assert device.skipped == cpu.skipped
        assert device.grad_norm == cpu.grad_norm

    def close(self):
        for engine in self.engines:
            engine.close()


def compare(world, dtype, spoiled=(), **options):
    twins = Twins(world, dtype, **options)
    for step in range(STEPS):
        twins.step(spoil=step in spoiled, lr=options["lr"] * (1 + step))
    twins.require_same_bits()
    twins.close()


# ---- the same bits ----


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("rule", RULES)
def test_device_has_the_cpus_bits(worlds, rule, workers):
    for kind, dtype in product(KINDS, DTYPES):
        compare(worlds(workers), dtype, extrapolation=kind, inner_lr=0.05, **RULES[rule])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rule", ["Nesterov", "AdamW"])
def test_steps_that_look_at_norms_have_the_cpus_bits(worlds, rule, setting):
    for dtype in DTYPES:
        spoiled = (1,) if setting == "skipping" else ()
        compare(worlds(2), dtype, spoiled, **RULES[rule], **SETTINGS[setting])


def test_raw_displacements_have_the_cpus_bits(worlds):
    for kind in ("local", "global", "gaussian"):
        compare(worlds(2), "float32", extrapolation=kind, displacement="raw", **RULES["Adam"])


# ---- what optimizers do beside steps ----


def two_optimizers(world, make, **options):
    """One on the device and one on the CPU, of two parameters each."""
    made = []
    for where in (on_the_host_device, on_the_cpu):
        with where():
            params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in LENGTHS]
            made.append((make(params, world=world, **options), params))
    return made


def take_step(opt, params, seed):
    opt.zero_grad()
    random = np.random.default_rng([seed, opt.world.rank])
    for param in params:
        param.grad = torch.from_numpy(random.normal(size=param.numel()).astype(np.float32))
    opt.step()


def require_same_parameters(optimizers):
    (device, mine), (cpu, its) = optimizers
    for there, here in zip(mine, its, strict=True):
        assert_same_bits(there.detach().numpy(), here.detach().numpy(), "weights")
    with device.master_weights(), cpu.master_weights():
        for there, here in zip(mine, its, strict=True):
            assert_same_bits(there.detach().numpy(), here.detach().numpy(), "master weights")


def make_extrap(params, **more):
    return xc.ExtrapSGD(params, lr=0.1, momentum=0.9, inner_lr="lr", **more)


def test_state_goes_from_a_device_to_the_cpu_and_back(world):
    optimizers = two_optimizers(world, make_extrap)
    for opt, params in optimizers:
        take_step(opt, params, seed=1)
    states = [opt.state_dict() for opt, _ in optimizers]
    for (opt, params), state in zip(optimizers, reversed(states), strict=True):
        take_step(opt, params, seed=2)
        opt.load_state_dict(state)
        take_step(opt, params, seed=3)
    require_same_parameters(optimizers)
    for opt, _ in optimizers:
        opt.close()


def test_weights_that_others_wrote_are_adopted_on_a_device(world):
    optimizers = two_optimizers(world, make_extrap)
    for opt, params in optimizers:
        take_step(opt, params, seed=1)
        with torch.no_grad():
            params[0].fill_(0.5)
        with pytest.raises(xc.UsageError, match="written or replaced"):
            opt.step()
        opt.adopt()
        take_step(opt, params, seed=2)
        with opt.master_weights(write=True), torch.no_grad():
            params[1].mul_(2)
        take_step(opt, params, seed=3)
    require_same_parameters(optimizers)
    for opt, _ in optimizers:
        opt.close()


def test_absent_gradients_count_as_zeros_on_a_device(world):
    optimizers = two_optimizers(world, make_extrap)
    for opt, params in optimizers:
        take_step(opt, params, seed=1)
        opt.zero_grad()
        if world.rank == 0:
            params[1].grad = torch.ones(LENGTHS[1])
        opt.step()
    require_same_parameters(optimizers)
    for opt, _ in optimizers:
        opt.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_collected_from_wherever_they_lie(world, dtype):
    lengths = [1, 7, 40_000, 8] + 125 * [3]  # over a piece, and over a batch of copies
    optimizers = []
    for where in (on_the_host_device, on_the_cpu):
        with where():
            params = [torch.nn.Parameter(torch.ones(n, dtype=DTYPES[dtype])) for n in lengths]
            optimizers.append((xc.SGD(params, lr=0.5, world=world), params))
    for opt, params in optimizers:
        random = np.random.default_rng(world.rank)
        for i, param in enumerate(params):
            values = torch.from_numpy(random.normal(size=param.numel() + 3).astype(np.float32))
            param.grad = values.to(DTYPES[dtype])[i % 4 : i % 4 + param.numel()]
        opt.step()
    for mine, its in zip(optimizers[0][1], optimizers[1][1], strict=True):
        assert_same_bits(mine.detach().float().numpy(), its.detach().float().numpy(), "weights")
    for opt, _ in optimizers:
        opt.close()


# ---- captured steps ----

CAPTURABLE = {
    "SGD": lambda params, **more: xc.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **more),
    "ExtrapSGD": make_extrap,
    "Adam": lambda params, **more: xc.Adam(params, lr=0.01, weight_decay=0.1, **more),
    "ExtrapAdam, random": lambda params, **more: xc.ExtrapAdam(params, extrapolation="gaussian", **more),
    "clipped": lambda params, **more: make_extrap(params, max_grad_norm=1.0, **more),
    "displaced unclipped": lambda params, **more: make_extrap(
        params, max_grad_norm=1.0, extrapolation="global", inner_clip=False, **more
    ),
    "guarded": lambda params, **more: xc.Adam(params, **{"lr": 0.01, "skip_nonfinite": True, **more}),
}


@contextmanager
def captured(opt):
    opt._device.begin_capture()
    try:
        yield
    finally:
        opt._device.end_capture()


def fill(params, seed):
    random = np.random.default_rng(seed)
    for param in params:
        values = torch.from_numpy(random.normal(size=param.numel()).astype(np.float32))
        param.grad = values if param.grad is None else param.grad.copy_(values)


def a_captured_one_and_its_twin(virtual, make, **options):
    """Two optimizers after a step, of which the one on the device has captured the next."""
    optimizers = two_optimizers(virtual(1), make, **options)
    for opt, params in optimizers:
        fill(params, 0)
        opt.step()
    device = optimizers[0][0]
    with captured(device):
        device.step()
    return optimizers


@pytest.mark.parametrize("name", CAPTURABLE)
def test_replays_with_changing_rates_are_as_many_steps(virtual, name):
    optimizers = a_captured_one_and_its_twin(virtual, CAPTURABLE[name])
    (device, mine), (cpu, its) = optimizers
    for n in range(1, 6):
        with device.master_weights():
            pass  # looking at the weights leaves the recording as it is
        for opt, params in optimizers:
            fill(params, n)
            opt.param_groups[0]["lr"] = 0.1 / n
        device.prepare_replay()
        device._device.replay()
        cpu.step()
    require_same_parameters(optimizers)
    assert device._core.steps == cpu._core.steps
    for there, here in zip(
        device.state_dict()["extrapcomm"]["master"].values(),
        cpu.state_dict()["extrapcomm"]["master"].values(),
        strict=True,
    ):
        assert_same_bits(there.numpy(), here.numpy(), "saved weights")
    device.close()
    cpu.close()


def test_captured_step_changes_and_counts_nothing(virtual):
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(9))]
        opt = CAPTURABLE["SGD"](params, world=virtual(1))
    fill(params, 0)
    opt.step()
    before = params[0].detach().clone(), opt._core.steps, opt._core.updates(0)
    with captured(opt):
        opt.step()
    assert_same_bits(params[0].detach().numpy(), before[0].numpy(), "weights")
    assert (opt._core.steps, opt._core.updates(0)) == before[1:]
    opt.step()  # the ordinary step does not mind
    assert opt._core.steps == before[1] + 1
    opt.close()


def test_engine_replays_with_new_numbers(virtual):
    twins = Twins(virtual(1), "bfloat16", extrapolation="local", **RULES["Adam"])
    device, cpu = twins.engines
    twins.step()
    device._device.begin_capture()
    device.step(divisor=2.0)
    device._device.end_capture()
    for rate in (0.3, 0.2):
        for engine in twins.engines:
            for worker in engine.workers:
                for grad in worker.grads:
                    grad.fill_(rate)
        device.prepare_replay(lr=rate)
        device._device.replay()
        cpu.step(lr=rate, divisor=2.0)
    twins.require_same_bits()
    twins.close()


@pytest.mark.parametrize("name", ["clipped", "guarded"])
def test_replays_that_are_skipped_count_as_skipped_steps(virtual, name):
    optimizers = a_captured_one_and_its_twin(virtual, CAPTURABLE[name], skip_nonfinite=True)
    (device, mine), (cpu, its) = optimizers
    for n in range(1, 6):
        for _, params in optimizers:
            fill(params, n)
            if n in (2, 3):
                params[1].grad[n] = float("nan")
        device.prepare_replay()
        device._device.replay()
        cpu.step()
        if n in (2, 5):  # read or not
            assert device.skipped == cpu.skipped == (n == 2)
            np.testing.assert_equal(device.grad_norm, cpu.grad_norm)  # NaN is NaN
    assert [device._core.updates(i) for i in range(3)] == [4, 4, 4]
    require_same_parameters(optimizers)
    device.close()
    cpu.close()


def test_norm_may_change_between_replays(virtual):
    optimizers = a_captured_one_and_its_twin(virtual, CAPTURABLE["clipped"])
    (device, _), (cpu, _) = optimizers
    for norm in (0.5, float("inf"), 2.0):
        for opt, params in optimizers:
            fill(params, 1)
            opt.max_grad_norm = norm
        device.prepare_replay()
        device._device.replay()
        cpu.step()
    require_same_parameters(optimizers)
    device.close()
    cpu.close()


def test_norm_that_comes_after_a_capture_with_skipping_clips(virtual):
    def make(params, **more):
        return make_extrap(params, skip_nonfinite=True, extrapolation="gaussian", **more)

    optimizers = a_captured_one_and_its_twin(virtual, make)
    (device, _), (cpu, _) = optimizers
    for opt, params in optimizers:
        fill(params, 1)
        opt.max_grad_norm = 0.5
    device.prepare_replay()
    device._device.replay()
    cpu.step()
    require_same_parameters(optimizers)
    device.close()
    cpu.close()


def test_outcome_of_a_replay_that_has_not_come_is_refused_once(virtual):
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(9))]
        opt = CAPTURABLE["guarded"](params, world=virtual(1))
    fill(params, 0)
    opt.step()
    with captured(opt):
        opt.step()
    params[0].grad.fill_(float("nan"))
    opt.prepare_replay()
    opt._device.replay()
    assert opt.skipped
    opt.prepare_replay()
    with pytest.raises(xc.UsageError, match="captured step not replayed since"):
        opt.state_dict()
    params[0].grad.fill_(1.0)
    opt.prepare_replay()
    opt._device.replay()
    assert not opt.skipped and opt.state_dict()["state"][0]["step"] == 2
    opt.close()


def test_two_captures_in_a_row_need_a_step_between_them(virtual):
    opt, params = a_captured_one(virtual(1))
    with captured(opt), pytest.raises(xc.UsageError, match="take a step of the same parameters"):
        opt.step()
    opt.step()
    with captured(opt):
        opt.step()
    opt.prepare_replay()
    opt._device.replay()
    opt.close()


def test_scalers_step_is_not_captured(virtual):
    opt, params = a_captured_one(virtual(1))
    scaler = xc.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    with captured(opt), pytest.raises(xc.UsageError, match="with a GradScaler cannot be captured"):
        scaler.step(opt)
    opt.close()


def test_outcome_survives_a_new_group_and_a_capture_does_not(virtual):
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(9))]
        opt = CAPTURABLE["clipped"](params, world=virtual(1))
    fill(params, 0)
    opt.step()
    norm = opt.grad_norm
    with captured(opt):
        opt.step()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert norm is not None and opt.grad_norm == norm
    with pytest.raises(xc.UsageError, match="comes before each replay of a step that was captured"):
        opt.prepare_replay()
    opt.close()


class RateOnAGpu:
    """A learning rate that can be read, but for while a stream captures."""

    def __init__(self, value, opt):
        self.value, self.opt = value, opt

    def __float__(self):
        if self.opt._core.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.value


def test_rate_in_a_tensor_is_read_before_each_replay(virtual):
    optimizers = two_optimizers(virtual(1), CAPTURABLE["SGD"])
    (device, _), (cpu, _) = optimizers
    rate = RateOnAGpu(0.1, device)
    for opt, params in optimizers:
        opt.param_groups[0]["lr"] = rate
        fill(params, 0)
        opt.step()
    with captured(device):
        device.step()
    for n in range(1, 4):
        rate.value = 0.1 / n
        for _, params in optimizers:
            fill(params, n)
        device.prepare_replay()
        device._device.replay()
        cpu.step()
    require_same_parameters(optimizers)
    device.close()
    cpu.close()


def test_skipped_steps_on_a_device_are_counted_when_somebody_asks(world):
    optimizers = two_optimizers(world, CAPTURABLE["guarded"])
    for opt, params in optimizers:
        for n in range(4):
            fill(params, n)
            if n % 2 == 1 and world.rank == 0:
                params[0].grad[0] = float("inf")
            opt.step()
    for opt, _ in optimizers:
        assert opt.skipped and opt.grad_norm == float("inf")
        assert opt.state_dict()["state"][0]["step"] == 2
    require_same_parameters(optimizers)
    for opt, _ in optimizers:
        opt.close()


CANNOT_BE_CAPTURED = {
    "a trust ratio": lambda params, **more: xc.LARS(params, lr=0.1, **more),
    "a scale": lambda params, **more: xc.EG(params, lr=0.1, **more),
}


@pytest.mark.parametrize("name", CANNOT_BE_CAPTURED)
def test_step_that_asks_the_host_cannot_be_captured(virtual, name):
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(9))]
        opt = CANNOT_BE_CAPTURED[name](params, world=virtual(1))
    fill(params, 0)
    opt.step()
    with (
        captured(opt),
        pytest.raises(xc.UsageError, match="whose sums the host adds up cannot be captured"),
    ):
        opt.step()
    with pytest.raises(xc.UsageError, match="comes before each replay of a step that was captured"):
        opt.prepare_replay()
    opt.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_step_of_several_workers_cannot_be_captured(worlds, workers):
    if COMM.size * workers == 1:
        pytest.skip("one worker alone can")
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(9))]
        opt = CAPTURABLE["SGD"](params, world=worlds(workers))
    fill(params, 0)
    opt.step()
    with captured(opt), pytest.raises(xc.UsageError, match="by one rank alone, with one worker"):
        opt.step()
    opt.close()


def a_captured_one(world):
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(n)) for n in LENGTHS]
        opt = CAPTURABLE["SGD"](params, world=world)
    fill(params, 0)
    opt.step()
    with captured(opt):
        opt.step()
    return opt, params


def test_first_step_cannot_be_captured(virtual):
    with on_the_host_device():
        params = [torch.nn.Parameter(torch.ones(9))]
        opt = CAPTURABLE["SGD"](params, world=virtual(1))
    fill(params, 0)
    with captured(opt), pytest.raises(xc.UsageError, match="take such a step first"):
        opt.step()
    opt.close()


def test_replay_with_gradients_elsewhere_is_refused(virtual):
    opt, params = a_captured_one(virtual(1))
    params[1].grad = torch.ones(LENGTHS[1])
    with pytest.raises(xc.UsageError, match="gradient of '0.1' is not where the captured step reads it"):
        opt.prepare_replay()
    opt.close()


def test_replay_that_would_need_a_norm_is_refused(virtual):
    opt, _ = a_captured_one(virtual(1))
    opt.max_grad_norm = 1.0
    with pytest.raises(xc.UsageError, match="takes other kernels: take a step, and capture the next"):
        opt.prepare_replay()
    opt.close()


def test_replay_after_a_step_with_other_gradients_is_refused(virtual):
    opt, params = a_captured_one(virtual(1))
    params[0].grad = None
    opt.step()
    with pytest.raises(xc.UsageError, match="a step with gradients of other layers was taken since"):
        opt.prepare_replay()
    opt.close()


def test_replay_of_another_number_of_micro_batches_is_refused(virtual):
    opt, params = a_captured_one(virtual(1))
    with opt.no_sync():
        pass
    with pytest.raises(xc.UsageError, match="divides by 1 micro-batches, and now there are 2"):
        opt.prepare_replay()
    opt.close()


def test_loaded_weights_are_not_adopted_while_capturing(virtual):
    opt, params = a_captured_one(virtual(1))
    model = torch.nn.ParameterList(params)
    opt.attach(model)
    model.load_state_dict({name: torch.zeros_like(p) for name, p in model.state_dict().items()})
    with captured(opt), pytest.raises(xc.UsageError, match="take a step before you capture one"):
        opt.step()
    opt.prepare_replay()
    opt._device.replay()
    opt.close()


# ---- refusals ----

REFUSED = {
    "float64 parameters have no kernels": {"dtype": np.float64},
    "rule 'vrsgd' has no kernels": {"rule": "vrsgd"},
    "rule 'adamp' has no kernels": {"rule": "adamp"},
    "rule 'sgdp' has no kernels": {"rule": "sgdp"},
    "extrapolation 'filter' has no kernels": {"extrapolation": "filter", "inner_lr": 0.1},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_kernels_is_refused(worlds, words):
    options = dict(REFUSED[words])
    weights = np.ones((4, 3), options.pop("dtype", np.float32))
    either = f"{words} on host; take the CPU for it|must lie in one team"
    with on_the_host_device(), pytest.raises(xc.UsageError, match=either):
        xc.Engine(worlds(2), weights, **options)


def test_unfused_steps_are_refused_on_a_device(world):
    with on_the_host_device():
        engine = xc.Engine(world, np.ones(9, np.float32))
    with pytest.raises(xc.UsageError, match="unfused steps are taken on the CPU only"):
        engine.step_unfused()
    engine.close()


class OnGpu:
    """An array with DLPack that says that it is on a GPU."""

    def __init__(self, kind=2):
        self.kind = kind

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **_):
        return torch.ones(3).__dlpack__()


def test_array_on_a_gpu_without_the_part_for_gpus_says_what_to_do(world, monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(
        xc.DeviceError, match=r"is on cuda:0, .* no CUDA part: put nvcc on PATH and install it anew"
    ):
        xc.Engine(world, OnGpu())


def test_array_on_a_gpu_of_another_maker_is_refused(world):
    with pytest.raises(xc.DeviceError, match="works on CPUs and on CUDA devices"):
        xc.Engine(world, OnGpu(kind=10))


def test_array_on_a_gpu_that_is_not_there_is_refused(world, monkeypatch):
    if device.cuda_part() is None:
        pytest.skip("there was no nvcc when this was built")
    if device.cuda_part().device_count():
        pytest.skip("there is a GPU")
    with pytest.raises(xc.DeviceError, match="looking for GPUs: "):
        xc.Engine(world, OnGpu())


def test_arrays_on_several_devices_are_refused():
    with pytest.raises(xc.UsageError, match="must all lie on one device, not on cpu, cuda:0"):
        device.device_for(["cpu", "cuda:0"])


# ---- which GPU ----


def test_ranks_of_a_host_are_numbered(world):
    assert world.local_rank == world.rank


class Gpu:
    """A device that says that it is a GPU."""

    name = "cuda:0"


class OneGpu:
    """The part for GPUs of a machine with one."""

    @staticmethod
    def identify(index):
        return "GPU-one"


def test_ranks_that_share_a_gpu_are_warned_of_once(world, monkeypatch, caplog):
    monkeypatch.setattr(device, "cuda_part", OneGpu)
    device._warn_once.cache_clear()
    for _ in range(2):
        device.warn_of_shared_gpu(world, Gpu())
    told = [record.getMessage() for record in caplog.records if "use the same GPU" in record.getMessage()]
    assert len(told) == (COMM.size > 1 and world.rank == 0)
    device._warn_once.cache_clear()


def test_ranks_on_different_kinds_of_devices_are_refused(world):
    if COMM.size == 1:
        pytest.skip("one rank agrees with itself")
    title = device.title_on("SGD", Gpu() if world.rank == 1 else None)
    with pytest.raises(xc.MismatchError, match="rank 0 makes a SGD, rank 1 a SGD on a GPU"):
        world.agree(None, title)


def test_sharing_names_ranks_and_what_to_do():
    assert sharing_warning(["a", "b", "c"]) is None
    assert "ranks 1-2 use the same GPU (b)" in sharing_warning(["a", "b", "b"])
    assert "world.local_rank % torch.cuda.device_count()" in sharing_warning(["a", "a"])


def test_hosts_with_fewer_gpus_than_ranks_are_warned_of():
    one, two = {"id": "1", "name": "x"}, {"id": "2", "name": "x"}
    assert gpu_warnings(["a", "a"], [[], []]) == []
    assert gpu_warnings(["a", "a"], [[one, two], [one, two]]) == []
    assert gpu_warnings(["a", "b"], [[one], [two]]) == []
    (warning,) = gpu_warnings(["a", "a", "b"], [[one], [one], [two]])
    assert "2 ranks on a see 1 GPU together" in warning
