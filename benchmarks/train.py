"""Two more tables: what the step costs a training loop, and what calls cost when there is nothing to do."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from race import race
from rivals import Contestant
from table import Column, number, print_row, print_titles
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import extrapcomm as xc
from extrapcomm.binding import MANNERS

PERCEPTRON = (50, 316, 16)  # depth, width, batch: 100 tensors, 5.0 million parameters
TRAIN_LR = 1e-3
TINY = 16  # elements of a tiny tensor
SMALL = 16_384  # elements: the engine's whole step beside the all-reduce alone
TENSORS = 100


def run(args: argparse.Namespace, world: xc.World) -> tuple[str, list[dict[str, Any]]]:
    """The table that was asked for: its name and its rows for the JSON, whose keys are in README.md."""
    if args.train:
        return "train", train_table(args, world)
    return "overhead", overhead_table(args, world)


@dataclass
class Trainee(Contestant):
    """A model, the batch of its rank, and the optimizer that ends its iteration; without one, none does."""

    name: str
    model: nn.Module
    optimizer: Any
    batch: tuple[torch.Tensor, ...]

    def step(self) -> None:
        x, y = self.batch
        (self.optimizer or self.model).zero_grad()
        nn.functional.mse_loss(self.model(x), y).backward()
        if self.optimizer:
            self.optimizer.step()

    def close(self) -> None:
        getattr(self.optimizer, "close", lambda: None)()


def make_model(depth: int, width: int) -> nn.Module:
    """The same perceptron at every call; smooth, because rounding errors grow where rectifiers flip."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        nn.init.xavier_normal_(layer.weight)
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])


def make_trainees(world: xc.World, depth: int, width: int, batch: int) -> list[Trainee]:
    """The bare computation first, then the optimizers."""
    random = torch.Generator().manual_seed(1 + world.rank)
    data = tuple(torch.randn(batch, width, generator=random) for _ in range(2))
    bare, extrapolated, parallel, *plain = (make_model(depth, width) for _ in range(3 + len(MANNERS)))
    ours = {"lr": TRAIN_LR, "momentum": 0.9, "world": world}
    wrapped = DistributedDataParallel(parallel, gradient_as_bucket_view=True)
    torch_sgd = torch.optim.SGD(wrapped.parameters(), lr=TRAIN_LR, momentum=0.9, fused=True)
    return [
        Trainee("forward+backward", bare, None, data),
        *[
            Trainee(f"xc.SGD, {manner}", model, xc.SGD(model.parameters(), **ours, gradients=manner), data)
            for manner, model in zip(MANNERS, plain, strict=True)
        ],
        Trainee("xc.ExtrapSGD", extrapolated, xc.ExtrapSGD(extrapolated.parameters(), **ours), data),
        Trainee("DDP + torch SGD", wrapped, torch_sgd, data),
    ]


def train_table(args: argparse.Namespace, world: xc.World) -> list[dict[str, Any]]:
    """Iterations of all trainees, in turns; what exceeds the bare computation is the step's exposed time."""
    comm = world.comm
    depth, width, batch = args.perceptron
    trainees = make_trainees(world, depth, width, batch)
    seconds = race(comm, trainees, args.iters, args.warmup_iters)
    plain = trainees[1 : 1 + len(MANNERS)] if args.check else []
    wrong = {t.name: comm.allreduce(count_strays(t, trainees[-1])) for t in plain}
    for trainee in trainees:
        trainee.close()
    rows = [summary(t.name, times) for t, times in zip(trainees, seconds.T, strict=True)]
    for row in rows:
        row |= {"exposed_us": row["time_us"] - rows[0]["time_us"], "nwrong": wrong.get(row["name"])}
    columns = [
        Column("contestant", "", 18, lambda row: row["name"]),
        Column("iteration", "(us)", 11, lambda row: number(row["time_us"], 1)),
        Column("p95", "(us)", 11, lambda row: number(row["p95_us"], 1)),
        Column("exposed step", "(us)", 12, lambda row: number(row["exposed_us"], 1)),
        Column("#wrong", "", 7, lambda row: number(row["nwrong"], 0)),
    ]
    size = sum(p.numel() for p in trainees[0].model.parameters())
    title = f"# {depth}-layer perceptron: {2 * depth} tensors, {size} parameters, batch {batch}, float32"
    return show(comm, title, columns, rows)


def count_strays(trainee: Trainee, judge: Trainee) -> int:
    """Master weights further from DDP's than 1e-6; only plain SGD is meant to agree."""
    with trainee.optimizer.master_weights(), torch.no_grad():
        pairs = zip(trainee.model.parameters(), judge.model.parameters(), strict=True)
        return sum(int(torch.count_nonzero(~((a - b).abs() <= 1e-6))) for a, b in pairs)


def summary(name: str, seconds: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "time_us": 1e6 * float(np.median(seconds)),
        "p95_us": 1e6 * float(np.percentile(seconds, 95)),
    }


@dataclass(frozen=True)
class Call:
    """One call, and the engine's own clock of the part of it that was spent in C++."""

    name: str
    step: Callable[[], Any]
    clock: Callable[[], float] | None = None

    def time(self, comm: MPI.Comm) -> tuple[float, float]:
        """Seconds of one call: all of it, and in C++ (0 where there is no clock)."""
        comm.Barrier()
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start, self.clock() if self.clock else 0.0


def make_calls(world: xc.World) -> list[Call]:
    engine = xc.Engine(world, torch.zeros(TINY), rule="sgd", momentum=0.9, extrapolation="local")
    small = xc.Engine(world, torch.zeros(SMALL), rule="sgd", momentum=0.9, extrapolation="local")
    buffer = np.zeros(SMALL, np.float32)
    ours = tiny_optimizer(lambda tensors: xc.ExtrapSGD(tensors, lr=1e-3, momentum=0.9, world=world))
    theirs = tiny_optimizer(lambda tensors: torch.optim.SGD(tensors, lr=1e-3, momentum=0.9, fused=True))
    return [
        Call(f"engine.step, {TINY} elements", lambda: engine.step(lr=1e-3), clock_of(engine)),
        Call(f"engine.step, {SMALL} elements", lambda: small.step(lr=1e-3), clock_of(small)),
        Call(f"MPI all-reduce, {SMALL} elements", lambda: world.comm.Allreduce(MPI.IN_PLACE, buffer)),
        Call(f"xc.ExtrapSGD.step, {TENSORS} tensors", ours.step, clock_of(ours)),
        Call(f"torch SGD(fused).step, {TENSORS} tensors", theirs.step),
    ]


def tiny_optimizer(make: Callable[[list[nn.Parameter]], Any]) -> Any:
    tensors = [nn.Parameter(torch.zeros(TINY)) for _ in range(TENSORS)]
    optimizer = make(tensors)
    for tensor in tensors:
        tensor.grad = torch.zeros(TINY)
    return optimizer


def clock_of(stepper: Any) -> Callable[[], float] | None:
    """The engine's own clock of its last step, where it shows one."""
    return (lambda: stepper.last_step_seconds) if hasattr(stepper, "last_step_seconds") else None


def overhead_table(args: argparse.Namespace, world: xc.World) -> list[dict[str, Any]]:
    """The whole call less the part inside C++ is Python's; torch's has no such clock, and no peers."""
    comm = world.comm
    rows = [overhead_row(call, args, comm) for call in make_calls(world)]
    columns = [
        Column("call", "", 38, lambda row: row["name"]),
        Column("time", "(us)", 9, lambda row: number(row["time_us"], 1)),
        Column("p95", "(us)", 9, lambda row: number(row["p95_us"], 1)),
        Column("in C++", "(us)", 9, lambda row: number(row["native_us"], 1)),
        Column("Python", "(us)", 9, lambda row: number(row["python_us"], 1)),
    ]
    return show(comm, f"# {comm.size} ranks, float32", columns, rows)


def overhead_row(call: Call, args: argparse.Namespace, comm: MPI.Comm) -> dict[str, Any]:
    """Medians over the iterations of what the slowest rank saw."""
    for _ in range(args.warmup_iters):
        call.time(comm)
    total, native = np.array([call.time(comm) for _ in range(args.iters)]).T
    slowest = np.array([total, native, total - native])
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    _, native_us, python_us = 1e6 * np.median(slowest, axis=1)
    clocked = {"native_us": float(native_us), "python_us": float(python_us)}
    return {**summary(call.name, slowest[0]), **(clocked if call.clock else dict.fromkeys(clocked))}


def show(
    comm: MPI.Comm, title: str, columns: Sequence[Column], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    if comm.rank == 0:
        print(title)
        print_titles(columns)
        for row in rows:
            print_row(columns, row)
    return rows
