"""`mpirun ... python -m extrapcomm tune`: what messages cost between teams, and which chunk suits them."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .engine import Engine
from .errors import UsageError
from .wire import WireOptions
from .world import World

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["tune"]

_CHUNKS = (
    7_168,
    15_360,
    65_536,
    131_072,
)  # elements; the first two stay below most MPIs' limit of short messages
_BURST = 64  # messages that are begun together
_LARGE = 1 << 22  # bytes


def tune(
    comm: "MPI.Intracomm", parameters: int, rounds: int, workers_per_team: int | None = None
) -> dict[str, Any]:
    """Collective: the wire's options that suit these ranks, and what was measured for them.

    Args:
        comm: ranks of at least two teams.
        parameters: of the model whose step is timed with each chunk.
        rounds: of each measurement; the median counts.
        workers_per_team: as `World` takes it.

    Returns:
        `wire`: the arguments of `WireOptions`; `seconds`: of a step, by chunk; `ranks`, `teams` and `hosts`.

    Raises:
        UsageError: on every rank, with one team, or for numbers that are not positive.
    """
    if parameters < 1 or rounds < 1:
        raise UsageError("tune needs a positive number of parameters and of rounds")
    with World(comm, workers_per_team=workers_per_team) as world:
        teams, costs = world.teams, _costs(comm, world.teams, rounds)
    seconds = {
        chunk: _step_seconds(comm, replace(costs, chunk=chunk), parameters, rounds, workers_per_team)
        for chunk in _CHUNKS
    }
    best = min(seconds, key=lambda chunk: seconds[chunk])
    return {
        "wire": asdict(replace(costs, chunk=best)),
        "seconds": {str(chunk): seconds[chunk] for chunk in _CHUNKS},
        "parameters": parameters,
        "ranks": comm.size,
        "teams": len(teams),
        "hosts": sorted(set(comm.allgather(os.uname().nodename))),
    }


def _costs(comm: "MPI.Intracomm", teams: list[list[int]], rounds: int) -> WireOptions:
    """Between the first rank of the first team and the first of the second."""
    if len(teams) < 2:
        raise UsageError(
            "tune measures what lies between teams, and these ranks are one: start it on several hosts, or give "
            "--workers-per-team to see several on one"
        )
    pair = [teams[0][0], teams[1][0]]
    other = pair[1 - pair.index(comm.rank)] if comm.rank in pair else None

    def message(size: int, count: int) -> float:
        """Seconds until `count` messages of so many bytes have come both ways."""
        return _median(comm, lambda: _exchange(comm, other, size, count), rounds)

    one, burst, large = message(0, 1), message(0, _BURST), message(_LARGE, 1)
    overhead = max((burst - one) / (_BURST - 1) / 2, 1e-9)
    return WireOptions(
        latency=max(one - 2 * overhead, 1e-9), overhead=overhead, bandwidth=_LARGE / max(large - one, 1e-9)
    )


def _exchange(comm: "MPI.Intracomm", other: int | None, size: int, count: int) -> None:
    if other is None:
        return
    sent, received = np.zeros(size, np.uint8), np.empty((count, size), np.uint8)
    requests = [comm.Irecv(row, other) for row in received] + [comm.Isend(sent, other) for _ in range(count)]
    for request in requests:
        request.Wait()


def _median(comm: "MPI.Intracomm", work: Callable[[], object], rounds: int) -> float:
    """Seconds of the slowest rank in the middle one of the rounds; one more goes before them unmeasured."""
    seconds = []
    for _ in range(rounds + 1):
        comm.Barrier()
        start = time.perf_counter()
        work()
        seconds.append(max(comm.allgather(time.perf_counter() - start)))
    return float(np.median(seconds[1:]))


def _step_seconds(
    comm: "MPI.Intracomm", options: WireOptions, parameters: int, rounds: int, workers_per_team: int | None
) -> float:
    with World(comm, wire=options, workers_per_team=workers_per_team) as world:
        engine = Engine(world, np.zeros(parameters, np.float32), "sgd", lr=0.1, momentum=0.9)
        seconds = _median(comm, engine.step, rounds)
        engine.close()
    return seconds


def save(found: dict[str, Any], path: str) -> None:
    """As `WireOptions.load` reads it."""
    Path(path).write_text(json.dumps(found, indent=2) + "\n")
