"""Row: replays of a captured step with changing rates have the bits of as many ordinary steps on the CPU."""

import sys
from contextlib import contextmanager

import numpy as np
import torch
from common import on_the_cpu, place, refusal, require, require_gpu
from store_world import StoreWorld

import extrapcomm as xc

REPLAYS = 6
OPTIMIZERS = {
    "SGD": lambda params, **more: xc.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **more),
    "ExtrapSGD": lambda params, **more: xc.ExtrapSGD(params, lr=0.1, momentum=0.9, inner_lr="lr", **more),
    "Adam": lambda params, **more: xc.Adam(params, lr=0.01, weight_decay=0.1, **more),
    "ExtrapAdam": lambda params, **more: xc.ExtrapAdam(params, lr=0.01, **more),
    "clipped ExtrapSGD": lambda params, **more: xc.ExtrapSGD(params, lr=0.1, max_grad_norm=0.5, **more),
    "guarded Adam": lambda params, **more: xc.Adam(params, lr=0.01, skip_nonfinite=True, **more),
}
SPOILED = 3  # the replay whose gradient is not finite, for those that are guarded


class Run:
    """One parameter whose gradient is `given` at every step."""

    def __init__(self, make, where: str, **more) -> None:
        self.world = StoreWorld()
        self.param = torch.nn.Parameter(torch.linspace(-1, 1, 1500).to(where))
        self.given = torch.zeros(1500, device=where)
        self.opt = make([self.param], world=self.world, **more)

    def iteration(self) -> None:
        (self.param * self.given).sum().backward()
        self.opt.step()

    def set(self, step: int, values: torch.Tensor) -> None:
        self.given.copy_(values)
        self.opt.param_groups[0]["lr"] = 0.05 / (1 + step)

    def close(self) -> None:
        self.opt.close()
        self.world.close()


@contextmanager
def recording(run: Run):
    """What happens within is recorded; gives the function that replays it."""
    replays = []
    if place() == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield lambda: replays[0]()
        replays.append(graph.replay)
        return
    run.opt._device.begin_capture()
    yield lambda: replays[0]()
    run.opt._device.end_capture()
    replays.append(run.opt._device.replay)


def gradients() -> list[torch.Tensor]:
    random = np.random.default_rng(1)
    return [torch.from_numpy(random.normal(size=1500).astype(np.float32)) for _ in range(REPLAYS + 1)]


def replay_has_the_bits_of_ordinary_steps(name: str) -> None:
    device = Run(OPTIMIZERS[name], place())
    with on_the_cpu():
        cpu = Run(OPTIMIZERS[name], "cpu")
    first, *others = gradients()
    for run in (device, cpu):
        run.set(0, first)
        run.opt.zero_grad()
        run.iteration()
    if place() == "cuda":
        device.opt.zero_grad()
    with recording(device) as replay:
        if place() == "cuda":
            device.iteration()
        else:
            device.opt.step()  # the host records its own work, not torch's
    for step, values in enumerate(others, 1):
        evaluate(device)
        if step == SPOILED and name.startswith("guarded"):
            values[7] = float("inf")
        for run in (device, cpu):
            run.set(step, values)
        cpu.opt.zero_grad()
        cpu.iteration()
        if place() == "cpu":
            device.param.grad.copy_(values)
        device.opt.prepare_replay()
        replay()
    same = torch.equal(device.param.detach().cpu(), cpu.param.detach())
    require(same, f"{name}: weights differ after {REPLAYS} replays")
    require(device.opt._core.steps == cpu.opt._core.steps, f"{name}: steps were counted wrongly")
    updates = [run.opt._core.updates(0) for run in (device, cpu)]
    require(updates[0] == updates[1], f"{name}: updates were counted wrongly: {updates}")
    require(device.opt.grad_norm == cpu.opt.grad_norm, f"{name}: norms differ")
    for run in (device, cpu):
        run.close()


def evaluate(run: Run) -> None:
    """Master weights are looked at between replays; what they need must not disturb the recording."""
    with run.opt.master_weights():
        run.param.sum().item()


def what_cannot_be_captured_is_refused() -> None:
    run = Run(lambda params, **more: xc.LARS(params, lr=0.1, **more), place())
    run.iteration()
    try:
        with recording(run):
            words = refusal(run.opt.step)
    except RuntimeError:  # torch's, of the capture that was left
        pass
    require("cannot be captured" in words, f"trust ratios: {words}")
    run.close()


def main() -> int:
    require_gpu()
    for name in OPTIMIZERS:
        replay_has_the_bits_of_ordinary_steps(name)
    what_cannot_be_captured_is_refused()
    print(f"{REPLAYS} replays of {', '.join(OPTIMIZERS)} with changing rates, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
