"""`python -m extrapcomm info`: what was built, what was loaded, and what will hurt; `tune`: what the wire costs.

Run both under mpirun.
"""

import argparse
import json
import os
import sys
from importlib import metadata
from typing import Any

from . import _core
from ._version import __version__
from .device import cuda_part, gpus_here
from .errors import Error
from .launch import machine_limits, singleton_warning
from .placement import gpu_warnings, place_here, placement_warnings, ranges
from .tune import save, tune
from .wire import built_wires
from .world import World

_PACKAGES = ("numpy", "mpi4py", "torch", "cupy", "pybind11")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m extrapcomm", description="extrapcomm's commands")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what was built, loaded and found on this machine")
    info.add_argument("--json", action="store_true", help="machine-readable")
    tuning = commands.add_parser("tune", help="measure what messages between hosts cost, and choose by it")
    tuning.add_argument("-o", "--output", help="a JSON file for xc.WireOptions.load()")
    tuning.add_argument("--parameters", type=int, default=1_000_000, help="of the step that is timed")
    tuning.add_argument("--rounds", type=int, default=11, help="of each measurement")
    tuning.add_argument("--workers-per-team", type=int, help="cut the ranks of a host into teams of so many")
    options = parser.parse_args(arguments)
    return show_info(options.json) if options.command == "info" else show_tuning(options)


def show_tuning(options: argparse.Namespace) -> int:
    """Collective; rank 0 prints and writes."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    try:
        found = tune(comm, options.parameters, options.rounds, options.workers_per_team)
        if comm.rank == 0 and options.output:
            save(found, options.output)
    except (Error, OSError) as error:
        if comm.rank == 0:
            print(f"extrapcomm {__version__}: {error}", file=sys.stderr)
        return 1
    if comm.rank == 0:
        print(json.dumps(found, indent=2))
    return 0


def show_info(as_json: bool) -> int:
    """Collective under mpirun; rank 0 prints."""
    try:
        facts = gather_facts()
    except (Error, ImportError, RuntimeError) as error:
        print(f"extrapcomm {__version__}: {error}", file=sys.stderr)
        return 1
    if facts["team"][0]["pid"] == os.getpid():
        print(json.dumps(facts, indent=2) if as_json else as_text(facts))
    return 0


def gather_facts() -> dict[str, Any]:
    """Everything that `info` knows, the same on every rank."""
    from mpi4py import MPI

    team = MPI.COMM_WORLD.allgather(place_here())
    gpus = MPI.COMM_WORLD.allgather(gpus_here())
    with World(MPI.COMM_WORLD) as world:  # proves that the ranks of a host can open each other's memory
        teams = world.teams
    facts: dict[str, Any] = {
        "extrapcomm": __version__,
        "python": sys.version.split()[0],
        "build": _core.build_info(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "mpi": MPI.Get_library_version().split("\0")[0].splitlines()[0],
        "mpi_standard": ".".join(map(str, MPI.Get_version())),
        "team": [{"rank": rank, **member} for rank, member in enumerate(team)],
        "teams": teams,
        "wires": built_wires(),
        "limits": machine_limits(),
        "gpus": gpus,
        "cuda": cuda_facts(),
    }
    facts["warnings"] = warnings_about(facts)
    return facts


def cuda_facts() -> dict[str, str] | None:
    """What the part for GPUs was built for, and how it orders what ranks do on them; None without that part."""
    part = cuda_part()
    return part and {"architectures": part.architectures, "sync": os.environ.get("XC_GPU_SYNC") or "event"}


def warnings_about(facts: dict[str, Any]) -> list[str]:
    """What will hurt, and what to do about it."""
    team, limits = facts["team"], facts["limits"]
    alone = singleton_warning(len(team), facts["mpi"])
    warnings = [*([alone] if alone else []), *placement_warnings(team)]
    warnings += gpu_warnings([member["host"] for member in team], facts["gpus"])
    limit = limits["cgroup_memory_max"]
    if limit is not None and limit < (limits["memory_available"] or 0):
        warnings.append(
            f"the container's memory limit is {_size(limit)}; weights, gradients and state count against it"
        )
    return warnings


def as_text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    limits = facts["limits"]
    lines = [
        f"extrapcomm {facts['extrapcomm']}, Python {facts['python']}",
        f"  built with      {facts['build']['compiler']}; tile loops use {facts['build']['instruction_set']}, "
        f"stores past the cache {facts['build']['store_bytes']} bytes, tiles {facts['build']['tile']}",
        f"  MPI loaded      {facts['mpi']} (MPI {facts['mpi_standard']})",
        "  packages        " + ", ".join(f"{n} {v or 'not installed'}" for n, v in facts["packages"].items()),
        f"  memory          {_size(limits['memory_available'])} available, container limit "
        f"{_size(limits['cgroup_memory_max'])}, /dev/shm {_size(limits['dev_shm_free'])} free of "
        f"{_size(limits['dev_shm_size'])}, huge pages for shared memory: {limits['shmem_huge_pages']}",
        f"  between hosts   {' and '.join(facts['wires']) or 'nothing: it was built without an mpicxx'}",
        *_gpus(facts),
        f"  team            {_teams(facts['teams'])}",
        *(
            f"    rank {m['rank']}: {m['host']}, process {m['pid']}, cores {ranges(m['cores'])}"
            for m in facts["team"]
        ),
        *(f"  WARNING: {text}" for text in facts["warnings"]),
    ]
    return "\n".join(lines)


def _gpus(facts: dict[str, Any]) -> list[str]:
    """The part for GPUs, and every GPU that a rank sees, with the ranks that see it."""
    if facts["cuda"] is None:
        return ["  GPUs            not used: it was built without an nvcc"]
    first = "  GPUs            kernels for {architectures}; ranks are ordered by {sync} (XC_GPU_SYNC)"
    seen: dict[str, tuple[str, list[int]]] = {}
    for rank, gpus in enumerate(facts["gpus"]):
        for gpu in gpus:
            seen.setdefault(gpu["id"], (gpu["name"], []))[1].append(rank)
    lines = [f"    {id}: {name}; seen by rank {ranges(ranks)}" for id, (name, ranks) in seen.items()]
    return [first.format(**facts["cuda"]), *(lines or ["    no GPU is seen"])]


def _teams(teams: list[list[int]]) -> str:
    ranks = f"{sum(map(len, teams))} rank(s)"
    if len(teams) == 1:
        return f"{ranks}, one team through shared memory"
    return f"{ranks} in {len(teams)} teams; shared memory inside, MPI between: " + " | ".join(
        map(ranges, teams)
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _size(count: int | None) -> str:
    return "unlimited" if count is None else f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
