"""How time is taken, and what is known about the place where it was taken."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from rivals import Contestant

import extrapcomm as xc

# Rounds before the clock starts: engines find out in their first 24 steps how they store.
WARM_UP = 30


def race(
    comm: MPI.Comm,
    contestants: Sequence[Contestant],
    iterations: int,
    warmup: int,
    before: Callable[[Contestant], None] = lambda _: None,
) -> np.ndarray:
    """Seconds by iteration and contestant, as the slowest rank saw them; `before` is called before each step.

    The contestants take turns, in a fresh order each round that is the same on all ranks: what disturbs the
    machine disturbs all of them, and none always inherits the caches of the same neighbour.
    """
    gc.collect()
    gc.disable()
    orders = np.random.default_rng(0)
    for _ in range(warmup):
        run_round(comm, contestants, orders, before)
    seconds = np.array([run_round(comm, contestants, orders, before) for _ in range(iterations)])
    gc.enable()
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return seconds


def run_round(
    comm: MPI.Comm,
    contestants: Sequence[Contestant],
    orders: np.random.Generator,
    before: Callable[[Contestant], None],
) -> np.ndarray:
    seconds = np.empty(len(contestants))
    for i in orders.permutation(len(contestants)):
        contestants[i].prepare()
        before(contestants[i])
        comm.Barrier()
        start = time.perf_counter()
        contestants[i].step()
        seconds[i] = time.perf_counter() - start
    return seconds


def leave_turns(_: Contestant) -> None:
    """A step finds in the caches what the others have left there of its own."""


def warm(contestant: Contestant) -> None:
    """A step finds what a backward pass has just written: its rank's gradients."""
    for gradient in contestant.gradients():
        gradient.mul_(1)


def cold(_: Contestant) -> None:
    """A step finds nothing of its own."""
    flush().add_(1)


CACHES = {"turns": leave_turns, "warm": warm, "cold": cold}


@cache
def flush() -> torch.Tensor:
    """Twice what the last level of the caches holds, and at least 64 MB."""
    try:
        kilobytes = int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip("K\n"))
    except (OSError, ValueError):
        kilobytes = 0
    return torch.zeros(max(2 * 1024 * kilobytes, 64_000_000) // 4)


def share_cores(comm: MPI.Comm) -> None:
    """Give every rank's torch the cores it may use, divided by the ranks that may use them too."""
    mine = os.sched_getaffinity(0)
    everywhere = set().union(*comm.allgather(mine))
    torch.set_num_threads(max(1, min(len(mine), len(everywhere) // comm.size)))


def describe(world: xc.World) -> dict[str, Any]:
    """The circumstances: collective, the same answer on every rank."""
    comm = world.comm
    return {
        "command": " ".join(sys.argv),
        "ranks": comm.size,
        "workers_per_rank": world.workers,
        "host": platform.node(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "affinity": comm.allgather(sorted(os.sched_getaffinity(0))),
        "torch_threads": comm.allgather(torch.get_num_threads()),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "mpi": " ".join(MPI.Get_library_version().split("\n")[0].strip("\0 ").split()),
        "versions": {
            "extrapcomm": xc.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return 1024 * int(fields["MemAvailable"].split()[0])
