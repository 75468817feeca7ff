"""Rivals that an expert would write by hand for this very problem, on memory that the ranks share by MPI.

They know one rule, one type and one array, check nothing, name no rank that is missing, and would lose state if a rank
died. Each rank updates its shard of w and writes every rank's next weights; without a displacement all ranks read w.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from problem import BETAS, EPS, LR, MOMENTUM, Problem
from rivals import Contestant

import extrapcomm as xc

SOURCE = Path(__file__).with_name("streams.cpp")
LINE = 16  # elements


class Window(Contestant):
    """The problem's arrays in one MPI window, which all ranks see."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        self.problem, self.comm = problem, world.comm
        count, ranks = problem.count, problem.ranks
        length = (
            -(-count // LINE) * LINE + LINE * 13
        )  # not a multiple of a page: streams would meet in the caches
        points = ranks if problem.displaced else 0
        own = 2 + problem.slots  # the barrier, w and the rule's
        arrays = own + ranks + points  # for each rank g and its point
        mine = arrays * length * 4 if problem.rank == 0 else 0
        self.window = MPI.Win.Allocate_shared(mine, 4, comm=self.comm)
        memory, _ = self.window.Shared_query(0)
        flat = np.ndarray(arrays * length, np.float32, buffer=memory)
        skip = -flat.ctypes.data % 64 // 4
        views = [flat[skip + i * length :][:count] for i in range(arrays)]
        self.barrier, self.w, self.slots = views[0], views[1], views[2:own]
        self.grads = views[own : own + ranks]
        self.x = views[own + ranks :] or [self.w] * ranks
        self.steps = 0
        self.begin_again()
        self.grads[problem.rank][:] = problem.grads[0].numpy()
        share = -(-count // (ranks * LINE)) * LINE
        self.begin, self.end = min(count, problem.rank * share), min(count, (problem.rank + 1) * share)
        self.comm.Barrier()

    def begin_again(self) -> None:
        """All arrays as before the first step; rank 0 does it, and others wait at the next barrier."""
        self.steps = 0
        if self.problem.rank == 0:
            for array in (self.barrier, *self.slots):
                array[:] = 0
            self.w[:] = self.problem.weights.numpy()

    def corrections(self) -> tuple[float, float]:
        """The bias corrections of Adam's moments for the step that begins."""
        self.steps += 1
        first, second = BETAS
        return 1 / (1 - first**self.steps), 1 / (1 - second**self.steps)

    def gradients(self) -> Sequence[torch.Tensor]:
        return [torch.from_numpy(self.grads[self.problem.rank])]

    def master(self) -> torch.Tensor:
        return torch.from_numpy(self.w)

    def points(self) -> Sequence[torch.Tensor]:
        return [torch.from_numpy(self.x[self.problem.rank])]

    def close(self) -> None:
        self.comm.Barrier()
        self.window.Free()


class Arguments(ctypes.Structure):
    """`Problem` of streams.cpp."""

    _fields_ = [
        ("barrier", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("processes", "begin", "end")],
        *[(name, ctypes.c_void_p) for name in ("grads", "points", "w")],
        ("slots", ctypes.c_void_p * 2),
        *[(name, ctypes.c_float) for name in ("lr", "momentum", "gamma", "beta2", "eps", "c1", "c2")],
        *[(name, ctypes.c_int32) for name in ("adam", "displaced", "past_cache")],
        ("ahead", ctypes.c_int64),
    ]


class HandLoop(Window):
    """One loop in C++ for all streams, and two barriers: the machine's ceiling.

    It tries stores past the cache or not, and prefetching or not, and takes the fastest here.
    """

    def __init__(self, problem: Problem, world: xc.World) -> None:
        super().__init__(problem, world)
        self.library = library(world.comm)
        pointers = ctypes.c_void_p * problem.ranks
        self.arrays = [pointers(*[a.ctypes.data for a in arrays]) for arrays in (self.grads, self.x)]
        self.arguments = Arguments(
            barrier=self.barrier.ctypes.data,
            processes=problem.ranks,
            begin=-(-self.begin // LINE) * LINE,
            end=-(-self.end // LINE) * LINE,  # the arrays are longer
            grads=ctypes.addressof(self.arrays[0]),
            points=ctypes.addressof(self.arrays[1]),
            w=self.w.ctypes.data,
            lr=LR,
            momentum=BETAS[0] if problem.rule == "adam" else MOMENTUM,
            gamma=problem.gamma,
            beta2=BETAS[1],
            eps=EPS,
            adam=problem.rule == "adam",
            displaced=problem.displaced,
        )
        for i, slot in enumerate(self.slots):
            self.arguments.slots[i] = slot.ctypes.data
        self.address = ctypes.byref(self.arguments)
        self.choose()

    def step(self) -> None:
        if self.arguments.adam:
            self.arguments.c1, self.arguments.c2 = self.corrections()
        self.library.step(self.address)

    def choose(self) -> None:
        """Try each way a few times on the real arrays, alike on all ranks, and put the arrays back."""
        ways = [(past, ahead) for past in (0, 1) for ahead in (0, 128, 512)]
        seconds = np.empty((3, len(ways)))
        for row in seconds:
            for i, way in enumerate(ways):
                self.arguments.past_cache, self.arguments.ahead = way
                self.comm.Barrier()
                start = time.perf_counter()
                self.step()
                row[i] = time.perf_counter() - start
        self.comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
        self.arguments.past_cache, self.arguments.ahead = ways[int(np.median(seconds, axis=0).argmin())]
        self.begin_again()
        self.comm.Barrier()


class WindowNumba(Window):
    """The same loop in Python, compiled by numba, between two MPI barriers."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        super().__init__(problem, world)
        self.kernel = numba_kernel(problem.ranks, problem.displaced, problem.rule)
        points = self.x[: problem.ranks if problem.displaced else 0]
        self.arrays = (self.w, *self.slots, *self.grads, *points)
        self.kernel(0, 0, *self.numbers(), *self.arrays)
        self.steps = 0

    def numbers(self) -> tuple[np.float32, ...]:
        """The numbers of one step."""
        own = (MOMENTUM,)
        if self.problem.rule == "adam":
            own = (*BETAS, EPS, *self.corrections())
        return tuple(map(np.float32, (LR, self.problem.gamma, *own)))

    def step(self) -> None:
        numbers = self.numbers()
        self.comm.Barrier()
        self.kernel(self.begin, self.end, *numbers, *self.arrays)
        self.comm.Barrier()


class WindowCompile(Window):
    """The same expressions on torch tensors, compiled by torch.compile, between two MPI barriers."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        super().__init__(problem, world)
        own = slice(self.begin, self.end)
        points = self.x if problem.displaced else []
        self.arrays = [
            [torch.from_numpy(a[own]) for a in arrays]
            for arrays in (self.grads, points, [self.w, *self.slots])
        ]
        self.kernel = torch.compile(partial(compiled_step, UPDATES[problem.rule]), dynamic=False)
        kept = [array.clone() for array in self.arrays[2]]
        self.kernel(*self.arrays, problem.gamma, self.numbers())
        self.steps = 0
        for array, value in zip(self.arrays[2], kept, strict=True):
            array.copy_(value)
        self.comm.Barrier()

    def numbers(self) -> list[torch.Tensor]:
        """The numbers that change from step to step: as tensors, or each step would be compiled anew."""
        return [torch.tensor(number) for number in self.corrections()] if self.problem.rule == "adam" else []

    def step(self) -> None:
        numbers = self.numbers()
        self.comm.Barrier()
        self.kernel(*self.arrays, self.problem.gamma, numbers)
        self.comm.Barrier()


def compiled_step(
    update: Callable[..., None],
    grads: list[torch.Tensor],
    points: list[torch.Tensor],
    state: list[torch.Tensor],
    gamma: float,
    numbers: list[torch.Tensor],
) -> None:
    update(sum(grads[1:], grads[0]) / len(grads), *state, *numbers)
    for point, g in zip(points, grads, strict=False):
        point.copy_(state[0] - gamma * g)


def sgd(mean: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> None:
    m.mul_(MOMENTUM).add_(mean)
    w.sub_(m, alpha=LR)


def adam(
    mean: torch.Tensor, w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *corrections: torch.Tensor
) -> None:
    m.mul_(BETAS[0]).add_(mean, alpha=1 - BETAS[0])
    v.mul_(BETAS[1]).add_(mean * mean, alpha=1 - BETAS[1])
    w.sub_(LR * (m * corrections[0]) / ((v * corrections[1]).sqrt() + EPS))


UPDATES = {"sgd": sgd, "adam": adam}

# The numbers and arrays of a rule's loop, and the lines of its body.
LOOPS = {
    "sgd": ("momentum", "m", ["m[i] = momentum * m[i] + mean", "w[i] -= lr * m[i]"]),
    "adam": (
        "beta1, beta2, eps, correction1, correction2",
        "m, v",
        [
            "m[i] = beta1 * m[i] + (one - beta1) * mean",
            "v[i] = beta2 * v[i] + (one - beta2) * mean * mean",
            "w[i] -= lr * (m[i] * correction1) / (sqrt(v[i] * correction2) + eps)",
        ],
    ),
}


@cache
def numba_kernel(ranks: int, displaced: bool, rule: str) -> Any:
    """A loop for so many ranks, written out, because numba vectorises no inner loop over arrays."""
    import numba

    g = [f"g{k}" for k in range(ranks)]
    x = [f"x{k}" for k in range(ranks)] if displaced else []
    numbers, arrays, body = LOOPS[rule]
    lines = [
        f"def kernel(begin, end, lr, gamma, {numbers}, w, {arrays}, {', '.join(g + x)}):",
        "    for i in range(begin, end):",
        f"        mean = ({' + '.join(f'{name}[i]' for name in g)}) * scale",
        *[f"        {line}" for line in body],
        *[f"        {x[k]}[i] = w[i] - gamma * {g[k]}[i]" for k in range(len(x))],
    ]
    names: dict[str, Any] = {"scale": np.float32(1 / ranks), "one": np.float32(1), "sqrt": np.sqrt}
    exec("\n".join(lines), names)
    return numba.njit(fastmath=True, nogil=True)(names["kernel"])


def library(comm: MPI.Comm) -> ctypes.CDLL:
    """Collective: streams.cpp, compiled by rank 0 for this processor."""
    path = None
    if comm.rank == 0:
        path = Path(tempfile.mkdtemp(prefix="xc-streams-")) / "streams.so"
        flags = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-shared"]
        subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(comm.bcast(path)))
    comm.Barrier()
    if path is not None:
        shutil.rmtree(path.parent)
    return loaded


def compiler() -> str:
    return shutil.which("c++") or shutil.which("g++") or ""


HAND_WRITTEN = {"hand_loop": HandLoop, "window_numba": WindowNumba, "window_compile": WindowCompile}


def why_not(rival: str, dtype: torch.dtype, workers: int) -> str:
    """Why a hand-written rival cannot run, or nothing."""
    if dtype != torch.float32 or workers > 1:
        return "written for float32 and one worker per rank"
    if rival in ("hand_loop", "window_compile") and not compiler():
        return "needs a C++ compiler: apt-get install g++"
    if rival == "window_numba" and importlib.util.find_spec("numba") is None:
        return "pip install numba"
    return ""
