"""How ranks lie on the cores of their hosts, and what to do where that will hurt."""

import os
from collections.abc import Sequence
from typing import Literal, TypedDict

from .launch import cores_allowed, cores_here, memory_domains

__all__ = ["Gpu", "Place", "gpu_warnings", "place_here", "placement_warnings", "ranges", "sharing_warning"]


class Gpu(TypedDict):
    """One that a process sees."""

    id: str  # that no other GPU of any host has
    name: str


class Place(TypedDict):
    """Where a rank is."""

    host: str
    pid: int
    cores: list[int]  # that it is bound to
    allowed: list[int]  # that it could be bound to
    domains: list[int]  # NUMA nodes of its cores
    threads: int | None  # OMP_NUM_THREADS


def place_here() -> Place:
    """This process's own."""
    cores = cores_here()
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "cores": cores,
        "allowed": cores_allowed(),
        "domains": memory_domains(cores),
        "threads": _threads_asked_for(),
    }


def placement_warnings(team: Sequence[Place]) -> list[str]:
    """What to change in how the ranks were started; those of each host are looked at by themselves."""
    hosts = dict.fromkeys(place["host"] for place in team)
    return [text for host in hosts for text in _on_host(host, [p for p in team if p["host"] == host])]


def gpu_warnings(hosts: Sequence[str], gpus: Sequence[Sequence[Gpu]]) -> list[str]:
    """Where the ranks of a host are more than the GPUs that they see.

    Args:
        hosts: of each rank.
        gpus: what each rank sees.
    """
    warnings = []
    for host in dict.fromkeys(hosts):
        seen = [mine for name, mine in zip(hosts, gpus, strict=True) if name == host]
        count = len({gpu["id"] for mine in seen for gpu in mine})
        if 0 < count < len(seen):
            warnings.append(
                f"{len(seen)} ranks on {host} see {count} GPU{'s' * (count > 1)} together, so some will share one: "
                "that is right but slow, as their kernels take turns"
            )
    return warnings


def sharing_warning(gpus: Sequence[str]) -> str | None:
    """What to do if ranks use the same GPU; None if each has its own.

    Args:
        gpus: which each rank uses.
    """
    for gpu in dict.fromkeys(gpus):
        ranks = [rank for rank, name in enumerate(gpus) if name == gpu]
        if len(ranks) > 1:
            return (
                f"ranks {ranges(ranks)} use the same GPU ({gpu}): their kernels take turns and its memory holds the "
                "arrays of all. To give each its own: torch.cuda.set_device(world.local_rank % "
                "torch.cuda.device_count()) before the model is made"
            )
    return None


def _on_host(host: str, places: list[Place]) -> list[str]:
    if len(places) == 1:
        return []
    if crowd := _crowd(host, places):
        return [crowd]
    looks = (_narrow(host, places), _threads(host, places), _domains(host, places))
    return [text for text in looks if text]


def _crowd(host: str, places: list[Place]) -> str | None:
    """Ranks are too many for some set of cores if more of them are bound within it than it has."""
    allowed = _all_of(places, "allowed")
    for cores in sorted({frozenset(place["cores"]) for place in places}, key=len):
        within = sum(cores >= set(place["cores"]) for place in places)
        if within > len(cores):
            break
    else:
        return None
    if len(places) > len(allowed):
        return (
            f"{len(places)} ranks share {len(allowed)} cores of {host}: steps stay correct but wait for one another; "
            f"start {len(allowed)} there (sbatch --ntasks-per-node, mpirun --map-by ppr:{len(allowed)}:node, -ppn)"
        )
    return (
        f"{within} ranks on {host} are bound to the {_cores(cores)} while it has {len(allowed)}: give each its own by "
        "--bind-to core (Open MPI) or -bind-to core (MPICH); several mpirun on one host all bind to its first cores, "
        "so there use none instead of core"
    )


def _narrow(host: str, places: list[Place]) -> str | None:
    idle = _all_of(places, "allowed") - _all_of(places, "cores")
    each = len(_all_of(places, "allowed")) // len(places)
    if any(len(place["cores"]) > 1 for place in places) or len(idle) < len(places):
        return None
    return (
        f"ranks on {host} are bound to one core each, so torch has one thread, and {len(idle)} cores are idle: "
        f"--map-by slot:PE={each} --bind-to core (Open MPI) or -bind-to core:{each} (MPICH) gives each {each}"
    )


def _threads(host: str, places: list[Place]) -> str | None:
    cores = len(_all_of(places, "cores"))
    asked = [place["threads"] for place in places]
    total = sum(place["threads"] or len(place["cores"]) for place in places)
    if total <= cores:
        return None
    share = max(1, cores // len(places))
    why = "OMP_NUM_THREADS is not set" if None in asked else f"OMP_NUM_THREADS is {max(filter(None, asked))}"
    return (
        f"{why}, so the {len(places)} ranks on {host} compute with {total} threads on {cores} cores: "
        f"OMP_NUM_THREADS={share}"
    )


def _domains(host: str, places: list[Place]) -> str | None:
    spread = max(len(place["domains"]) for place in places)
    if spread < 2:
        return None
    return (
        f"ranks on {host} may run in {spread} NUMA domains, and their memory stays in the one where they began: "
        "--map-by numa --bind-to numa (Open MPI) or -bind-to numa (MPICH) keeps both together"
    )


def _all_of(places: list[Place], which: Literal["cores", "allowed"]) -> set[int]:
    return set().union(*(place[which] for place in places))


def _cores(cores: frozenset[int]) -> str:
    return f"{'core' if len(cores) == 1 else 'cores'} {ranges(sorted(cores))}"


def _threads_asked_for() -> int | None:
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdigit() else None


def ranges(numbers: list[int]) -> str:
    """Consecutive numbers as ranges.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
