"""The machine's ceiling for the memory streams of a rule's passes, on memory that the ranks share by MPI."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hand_written import LINE, library
from mpi4py import MPI
from rivals import Contestant

import extrapcomm as xc

WAYS = [(past, ahead) for past in (0, 1) for ahead in (0, 128, 512)]


@dataclass(frozen=True)
class Pass:
    """The streams of one walk: the parts of every parameter that it touches.

    Attributes:
        gradients: whether it reads each worker's.
        points: whether it writes each worker's weights.
        read: how many shared arrays it reads.
        updated: how many it reads and writes.
    """

    gradients: bool
    points: bool
    read: int
    updated: int

    def words(self, workers: int) -> int:
        """Accesses of a parameter's numbers by the whole node."""
        return (self.gradients + self.points) * workers + self.read + 2 * self.updated


class Memory:
    """Shared arrays for the streams of all passes: each worker's gradient and point, and so many others."""

    def __init__(self, world: xc.World, count: int, others: int) -> None:
        self.world, self.count, self.library = world, count, library(world.comm)
        arrays = 1 + 2 * world.K + others
        # Not a multiple of a page: streams would meet in the caches.
        length = -(-count // LINE) * LINE + LINE * 13
        self.window = MPI.Win.Allocate_shared(
            arrays * length * 4 if world.rank == 0 else 0, 4, comm=world.comm
        )
        flat = np.ndarray(arrays * length, np.float32, buffer=self.window.Shared_query(0)[0])
        first = flat.ctypes.data + -flat.ctypes.data % 64
        self.places = [first + i * length * 4 for i in range(arrays)]
        if world.rank == 0:
            flat[:] = 0
        world.comm.Barrier()

    def close(self) -> None:
        self.world.comm.Barrier()
        self.window.Free()

    def streams_of(self, one: Pass) -> Streams:
        """The rank's part of a pass."""
        barrier, others = self.places[0], self.places[1 + 2 * self.world.K :]
        gradients = self.places[1 : 1 + self.world.K] if one.gradients else []
        points = self.places[1 + self.world.K : 1 + 2 * self.world.K] if one.points else []
        read = gradients + others[one.updated : one.updated + one.read]
        lines = -(-self.count // LINE)
        share = -(-lines // self.world.size)
        first, end = (min(lines, rank * share) for rank in (self.world.rank, self.world.rank + 1))
        bounds = (first * LINE, end * LINE)
        lists = [Addresses(places) for places in (read, others[: one.updated], points)]
        return Streams(barrier, self.world.size, bounds, lists)


class Addresses:
    """A list of arrays as C++ sees it."""

    def __init__(self, places: Sequence[int]) -> None:
        self.count = len(places)
        self.array = (ctypes.c_void_p * max(1, self.count))(*places)


class Streams(ctypes.Structure):
    """`Streams` of streams.cpp."""

    _fields_ = [
        ("barrier", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("processes", "begin", "end")],
        ("read", ctypes.c_void_p),
        ("reads", ctypes.c_int64),
        ("updated", ctypes.c_void_p),
        ("updates", ctypes.c_int64),
        ("written", ctypes.c_void_p),
        ("writes", ctypes.c_int64),
        ("past_cache", ctypes.c_int32),
        ("ahead", ctypes.c_int64),
    ]

    def __init__(self, barrier: int, ranks: int, bounds: tuple[int, int], lists: list[Addresses]) -> None:
        self.kept = lists
        numbers = [number for each in lists for number in (ctypes.addressof(each.array), each.count)]
        super().__init__(barrier, ranks, *bounds, *numbers)


class Ceiling(Contestant):
    """The streams of some passes, one pass after the other; each in the way that is the fastest here."""

    def __init__(self, memory: Memory, passes: Sequence[Pass]) -> None:
        self.run = memory.library.pass_over
        self.streams = [memory.streams_of(one) for one in passes]
        for streams in self.streams:
            choose(memory.world.comm, self.run, streams)

    def step(self) -> None:
        for streams in self.streams:
            self.run(ctypes.byref(streams))


def choose(comm: MPI.Comm, run: ctypes._CFuncPtr, streams: Streams) -> None:
    """Collective: try each way a few times, and take the fastest for the slowest rank."""
    seconds = np.empty((5, len(WAYS)))
    for row in seconds:
        for i, (streams.past_cache, streams.ahead) in enumerate(WAYS):
            comm.Barrier()
            start = time.perf_counter()
            run(ctypes.byref(streams))
            row[i] = time.perf_counter() - start
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    streams.past_cache, streams.ahead = WAYS[int(np.median(seconds, axis=0).argmin())]
