"""The fused step on GPUs against its rivals: `step.py --device cuda`; README.md defines every figure."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import extrapcomm as xc

LR, MOMENTUM, GAMMA = 1e-3, 0.9, 0.25
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rivals round elsewhere, and fuse multiplications with additions.
CLOSE = {"float32": 1e-4, "bfloat16": 2.0**-7}
MASTER = 4  # bytes of a master weight or of the momentum

Step = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """Flat weights, the same on every rank, and each rank's own constant gradient."""

    count: int
    dtype: str
    world: xc.World

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def draw(self, seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        values = torch.rand(self.count, generator=generator, device="cuda")
        return (values - 0.5).to(DTYPES[self.dtype])

    @property
    def weights(self) -> torch.Tensor:
        return self.draw(0)

    @property
    def gradient(self) -> torch.Tensor:
        return self.draw(1 + self.world.rank)


class Fused:
    """The engine: one kernel if a rank is alone."""

    def __init__(self, problem: Problem) -> None:
        options: dict[str, Any] = {
            "extrapolation": "local",
            "inner_lr": GAMMA,
            "lr": LR,
            "momentum": MOMENTUM,
        }
        self.engine = xc.Engine(problem.world, problem.weights, **options)
        self.engine.grads.copy_(problem.gradient)
        self.step: Step = self.engine.step
        # Gradient and weights of this rank, and its part of the master weights and the momentum, both ways.
        self.bytes = 2 * problem.itemsize + 4 * MASTER / problem.world.size

    @property
    def points(self) -> torch.Tensor:
        return self.engine.weights

    def close(self) -> None:
        self.engine.close()


class TwoBuffers:
    """torch's fused SGD on w, then x = w - gamma * g out of place. 16-bit gradients are widened for it first."""

    def __init__(self, problem: Problem) -> None:
        self.gradient, self.points = problem.gradient, problem.weights
        self.weights = problem.weights.float()
        narrow = problem.dtype != "float32"
        self.weights.grad = self.gradient.float() if narrow or problem.world.size > 1 else self.gradient
        self.optimizer = torch.optim.SGD([self.weights], lr=LR, momentum=MOMENTUM, fused=True)
        widening = problem.itemsize + MASTER if narrow else 0
        self.bytes: float = widening + 5 * MASTER + MASTER + 2 * problem.itemsize

    def step(self) -> None:
        if self.weights.grad is not self.gradient:
            self.weights.grad.copy_(self.gradient)
        self.optimizer.step()
        torch.sub(self.weights, self.gradient, alpha=GAMMA, out=self.points)

    def close(self) -> None:
        """Nothing is held beside memory."""


class Nccl(TwoBuffers):
    """The same with the gradients summed by NCCL; rates that are divided by K make their mean."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer.param_groups[0]["lr"] = LR / problem.world.size
        self.bytes = (
            9 * MASTER + 3 * problem.itemsize
        )  # a copy, at least one way in and out, SGD, displacement

    def step(self) -> None:
        self.weights.grad.copy_(self.gradient)
        dist.all_reduce(self.weights.grad)
        self.optimizer.step()
        torch.sub(self.weights, self.gradient, alpha=GAMMA, out=self.points)


class Naive(TwoBuffers):
    """One model: put the weights back, step, keep a copy of them, displace in place."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.kept = self.weights.clone()
        self.points = self.weights
        self.bytes = 12 * MASTER

    def step(self) -> None:
        self.weights.copy_(self.kept)
        self.optimizer.step()
        self.kept.copy_(self.weights)
        self.weights.add_(self.gradient, alpha=-GAMMA)


class Copy:
    """Yardstick: memory to memory on the device, together reading and writing what the fused step does."""

    def __init__(self, problem: Problem, bytes: float) -> None:
        self.bytes = bytes
        half = int(bytes * problem.count) // 2
        self.source = torch.ones(half, dtype=torch.uint8, device="cuda")
        self.target = torch.empty_like(self.source)

    def step(self) -> None:
        self.target.copy_(self.source)

    def close(self) -> None:
        """Nothing is held beside memory."""


@dataclass(frozen=True)
class Result:
    """Of each contestant median seconds and bytes per parameter; how many elements of the fused step are wrong."""

    problem: Problem
    seconds: dict[str, float]
    bytes: dict[str, float]
    wrong: int

    def bandwidth(self, name: str) -> float:
        """GB/s."""
        return self.bytes[name] * self.problem.count / self.seconds[name] / 1e9

    def of_copy(self, name: str) -> float:
        return self.bandwidth(name) / self.bandwidth("copy")

    def ratio(self, name: str) -> float:
        return self.seconds[name] / self.seconds["fused"]


def why_absent() -> str:
    """Why nothing can be measured here, or nothing."""
    if not torch.cuda.is_available():
        return (
            "--device cuda: torch sees no GPU here; run it on a machine that has one, with a torch for CUDA"
        )
    if find_spec("extrapcomm._cuda") is None:
        return (
            "--device cuda: extrapcomm was built without its CUDA part; put nvcc on PATH and install it anew"
        )
    return ""


def contestants(problem: Problem) -> dict[str, Any]:
    makers: dict[str, Any] = {"fused": Fused}
    if problem.world.size == 1:
        makers["torch"] = TwoBuffers
        if problem.dtype == "float32":
            makers["naive"] = Naive
    elif dist.is_initialized():
        makers["nccl"] = Nccl
    made = {name: make(problem) for name, make in makers.items()}
    return made | {"copy": Copy(problem, made["fused"].bytes)}


def measure(world: xc.World, count: int, dtype: str, iterations: int = 20, warmup: int = 5) -> Result:
    """Collective: all contestants at one size."""
    problem = Problem(count, dtype, world)
    made = contestants(problem)
    orders = np.random.default_rng(0)
    rounds = [run_round(world, made, orders) for _ in range(warmup + iterations)][warmup:]
    seconds = {name: slowest(world, statistics.median(times[name] for times in rounds)) for name in made}
    wrong = count_wrong(made)
    result = Result(problem, seconds, {name: each.bytes for name, each in made.items()}, wrong)
    for each in made.values():
        each.close()
    made.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return result


def run_round(world: xc.World, made: dict[str, Any], orders: np.random.Generator) -> dict[str, float]:
    """Seconds between two events around each contestant's step; they take turns in an order that is drawn anew."""
    names = list(made)
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in names}
    for i in orders.permutation(len(names)):
        begin, end = events[names[i]]
        world.gather_words("ready")
        begin.record()
        made[names[i]].step()
        end.record()
        torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in events.items()}


def slowest(world: xc.World, seconds: float) -> float:
    return max(float(text) for text in world.gather_words(str(seconds)))


def count_wrong(made: dict[str, Any]) -> int:
    """Elements of the fused step's weights that are not close to a rival's."""
    rival = made.get("torch") or made.get("nccl")
    if rival is None:
        return 0
    mine, its = made["fused"].points, rival.points
    near = CLOSE[str(mine.dtype).removeprefix("torch.")]
    return int((~torch.isclose(mine, its, rtol=near, atol=near)).sum())


def print_table(results: Sequence[Result]) -> None:
    """One line a contestant."""
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, extrapcomm {xc.__version__}")
    print(
        f"# {'type':<9} {'parameters':>11} {'who':<6} {'time':>9} {'bytes':>7} {'rate':>8} {'of':>6} {'time':>8}"
    )
    print(f"# {'':<9} {'':>11} {'':<6} {'(ms)':>9} {'(each)':>7} {'(GB/s)':>8} {'copy':>6} {'(x fused)':>8}")
    for result in results:
        for name in result.seconds:
            print(
                f"  {result.problem.dtype:<9} {result.problem.count:>11} {name:<6} {1e3 * result.seconds[name]:9.3f} "
                f"{result.bytes[name]:7.1f} {result.bandwidth(name):8.1f} {result.of_copy(name):6.2f} "
                f"{result.ratio(name):8.2f}"
            )
    print(f"# Wrong elements: {sum(result.wrong for result in results)}", flush=True)


def in_short(result: Result) -> str:
    others = [
        f"{name} {result.ratio(name):.2f} x" for name in result.seconds if name not in ("fused", "copy")
    ]
    figure = f"{1e3 * result.seconds['fused']:.3f} ms, {result.bandwidth('fused'):.0f} GB/s, "
    return f"{result.problem.dtype}: {figure}{result.of_copy('fused'):.2f} of copy; {', '.join(others)}"


def as_json(result: Result) -> dict[str, Any]:
    who = {
        name: {"time_us": 1e6 * seconds, "bytes": result.bytes[name], "gbps": result.bandwidth(name)}
        for name, seconds in result.seconds.items()
    }
    return {"type": result.problem.dtype, "count": result.problem.count, "who": who, "nwrong": result.wrong}


def start_nccl(world: xc.World) -> None:
    """Join torch.distributed if each rank has a GPU of its own; the port that rank 0 found travels by the world."""
    if world.size == 1 or torch.cuda.device_count() < world.size:
        return
    store = None
    if world.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world.size, True, wait_for_workers=False)
    port = int(world.gather_words(str(store.port if store else 0))[0])
    store = store or dist.TCPStore("127.0.0.1", port, world.size, False)
    dist.init_process_group("nccl", store=store, rank=world.rank, world_size=world.size)


def run(world: xc.World, count: int, iterations: int, warmup: int) -> list[Result]:
    """Collective: both types; rank 0 prints."""
    torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    start_nccl(world)
    results = [measure(world, count, dtype, iterations, warmup) for dtype in DTYPES]
    if world.rank == 0:
        print_table(results)
    if dist.is_initialized():
        dist.destroy_process_group()
    return results
