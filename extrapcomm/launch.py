"""What the launcher says about this process, and what the machine will allow it."""

import os
from pathlib import Path
from typing import Any

from .errors import UsageError

__all__ = ["cores_here", "launcher_size", "machine_limits", "require_launchers_mpi", "singleton_warning"]

# Set by the launchers of one MPI for the processes of that MPI.
_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "the mpirun of MPICH or its kin",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpirun",
}
# Set by Slurm's srun, HPE PALS and Flux for tasks of any kind.
_TASK_MANAGERS = {"SLURM_STEP_NUM_TASKS": "srun", "PALS_NRANKS": "PALS", "FLUX_JOB_SIZE": "Flux"}


def launcher_size() -> tuple[int, str] | None:
    """How many processes the launcher started, and the variable that says so."""
    for variable in (*_LAUNCHERS, *_TASK_MANAGERS):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable]), variable
    return None


def require_launchers_mpi(mpi_size: int, library: str) -> None:
    """UsageError if an MPI launcher started several processes of which this MPI sees only its own.

    Args:
        mpi_size: processes in MPI.COMM_WORLD.
        library: what mpi4py loaded, in the library's own words.
    """
    launched = launcher_size()
    if launched is None or launched[1] not in _LAUNCHERS or mpi_size > 1 or launched[0] == 1:
        return
    size, variable = launched
    raise UsageError(
        f"{_LAUNCHERS[variable]} started {size} processes ({variable}), but mpi4py has loaded {_first_line(library)}, "
        "which sees this one alone: start them with the mpirun of the MPI that mpi4py loads, or install an mpi4py "
        "for the launcher's MPI. To train alone in each process, say so: World(comm=MPI.COMM_SELF)"
    )


def singleton_warning(mpi_size: int) -> str | None:
    """What to do when MPI counts fewer processes than the launcher; None if all is well."""
    launched = launcher_size()
    if launched is None or mpi_size >= launched[0]:
        return None
    return (
        f"the launcher started {launched[0]} processes ({launched[1]}) but MPI sees only {mpi_size}: every process "
        "trains alone. The launcher belongs to another MPI than the one mpi4py loads; use the mpirun of that MPI "
        "(`python -m extrapcomm info` names it), or srun with a --mpi that it understands"
    )


def _first_line(text: str) -> str:
    return text.split("\0")[0].strip().partition("\n")[0].partition(",")[0]


def cores_here() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def machine_limits() -> dict[str, Any]:
    """What limits shared memory on this machine; sizes in bytes, None where it cannot be told."""
    return {
        "memory_available": _meminfo("MemAvailable"),
        "cgroup_memory_max": _number("/sys/fs/cgroup/memory.max"),
        "dev_shm_size": _file_system("/dev/shm", "f_blocks"),
        "dev_shm_free": _file_system("/dev/shm", "f_bavail"),
        "shmem_huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() else None


def _meminfo(key: str) -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _file_system(path: str, field: str) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return int(getattr(status, field)) * status.f_frsize


def _chosen(path: str) -> str | None:
    """The bracketed word of a kernel setting."""
    words = [word for word in _read(path).split() if word.startswith("[")]
    return words[0].strip("[]") if words else None
