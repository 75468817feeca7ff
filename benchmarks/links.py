"""What model.py has to know of a machine, measured: messages between two ranks, and the memory of a node.

All is collective over a communicator; the first and the last rank exchange the messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
from model import WORD, Machine, one_node_words
from mpi4py import MPI

import extrapcomm as xc

BURST = 64  # messages in flight at once
LARGE = 1 << 22  # bytes


def measure(comm: MPI.Intracomm, parameters: int, rounds: int) -> dict[str, Any]:
    """The machine's constants, the nodes, and the seconds of a fused step of all ranks."""
    machine = measure_machine(comm, parameters, rounds)
    with xc.World(comm) as world:
        seconds = step_seconds(world, parameters, rounds)
    job = {"parameters": parameters, "nodes": count_nodes(comm), "ranks": comm.size}
    return asdict(machine) | job | {"seconds": seconds}


def measure_machine(comm: MPI.Intracomm, parameters: int, rounds: int) -> Machine:
    overhead = message_overhead(comm, rounds)
    latency = max(0.0, one_way(comm, rounds) - 2 * overhead)
    nothing, much = (both_ways(comm, size, rounds) for size in (0, LARGE))
    return Machine(LARGE / (much - nothing), latency, overhead, memory_rate(comm, parameters, rounds))


def count_nodes(comm: MPI.Intracomm) -> int:
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    nodes = comm.allreduce(int(node.rank == 0))
    node.Free()
    return int(nodes)


def one_way(comm: MPI.Comm, rounds: int) -> float:
    """Seconds of a message of no length: half of a round trip, the median of the rounds."""
    nothing, last = np.zeros(0, np.uint8), comm.size - 1

    def exchange() -> None:
        if comm.rank == 0:
            comm.Send(nothing, last)
            comm.Recv(nothing, last)
        elif comm.rank == last:
            comm.Recv(nothing, 0)
            comm.Send(nothing, 0)

    return median(comm, exchange, rounds) / 2


def both_ways(comm: MPI.Comm, size: int, rounds: int) -> float:
    """Seconds in which two ranks send each other `size` bytes, as the nodes of a step do."""
    there, back = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    other = comm.size - 1 - comm.rank

    def exchange() -> None:
        if comm.rank in (0, comm.size - 1):
            comm.Sendrecv(there, other, 0, back, other, 0)

    return median(comm, exchange, rounds)


def message_overhead(comm: MPI.Comm, rounds: int) -> float:
    """Seconds that a message of no length keeps an end busy: a burst of them, by message."""
    last, nothing = comm.size - 1, np.zeros(0, np.uint8)
    if comm.rank == 0:
        requests: list[MPI.Prequest] = [comm.Send_init(nothing, last) for _ in range(BURST)]
    else:
        requests = [comm.Recv_init(nothing, 0) for _ in range(BURST if comm.rank == last else 0)]

    def burst() -> None:
        MPI.Prequest.Startall(requests)
        MPI.Request.Waitall(requests)

    seconds = median(comm, burst, rounds) / BURST
    for request in requests:
        request.Free()
    return seconds


def memory_rate(comm: MPI.Intracomm, parameters: int, rounds: int) -> float:
    """Bytes per second that the ranks of a node read and write in a fused step, on the slowest node."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    assert isinstance(node, MPI.Intracomm)
    with xc.World(node) as world:
        seconds = step_seconds(world, parameters, rounds)
    rate = WORD * one_node_words(node.size) * parameters / seconds
    node.Free()
    return float(comm.allreduce(rate, MPI.MIN))


def step_seconds(world: xc.World, parameters: int, rounds: int) -> float:
    """Of EXTRAP-SGD with momentum and constant gradients."""
    rule: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
    rule |= {"extrapolation": "local", "displacement": "raw", "inner_lr": 1e-2}
    with closing(xc.Engine(world, {"w": np.ones(parameters, np.float32)}, **rule)) as engine:
        engine.grads["w"][:] = 0.25
        return median(world.comm, engine.step, rounds)


def median(comm: MPI.Comm, call: Callable[[], object], rounds: int) -> float:
    """Of the slowest rank's seconds, after two calls for warming up."""
    seconds = np.array([timed(comm, call) for _ in range(rounds + 2)])[2:]
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return float(np.median(seconds))


def timed(comm: MPI.Comm, call: Callable[[], object]) -> float:
    comm.Barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
