"""What the launcher says about this process, and what the machine will allow it."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from .errors import UsageError

__all__ = [
    "cores_allowed",
    "cores_here",
    "launcher_size",
    "machine_limits",
    "memory_domains",
    "require_launchers_mpi",
    "singleton_warning",
]

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
    """UsageError if a launcher started several processes of which this MPI sees only its own.

    Args:
        mpi_size: processes in MPI.COMM_WORLD.
        library: what mpi4py loaded, in the library's own words.
    """
    launched = launcher_size()
    if launched is None or mpi_size > 1 or launched[0] == 1 or not _starts_ranks(launched[1]):
        return
    size, variable = launched
    raise UsageError(
        f"{_name(variable)} started {size} processes ({variable}), but mpi4py has loaded {_first_line(library)}, "
        f"which sees this one alone: {_how_to_start(library)}. "
        "To train alone in each process, say so: World(comm=MPI.COMM_SELF)"
    )


def singleton_warning(mpi_size: int, library: str = "") -> str | None:
    """What to do when MPI counts fewer processes than the launcher; None if all is well."""
    launched = launcher_size()
    if launched is None or mpi_size >= launched[0]:
        return None
    return (
        f"{_name(launched[1])} started {launched[0]} processes ({launched[1]}) but MPI sees only {mpi_size}, so they "
        f"do not train together: {_how_to_start(library)}"
    )


def _starts_ranks(variable: str) -> bool:
    """Whether what sets the variable starts that many copies of this program for certain.

    Under `srun --pty` only one task reaches the terminal, and Flux sets its variable for a shell as well.
    """
    return variable in _LAUNCHERS or (
        variable == "SLURM_STEP_NUM_TASKS" and "SLURM_PTY_PORT" not in os.environ
    )


def _name(variable: str) -> str:
    if variable == "PMI_SIZE" and {"SLURM_STEP_NUM_TASKS", "PMI_JOBID"} <= os.environ.keys():
        return "srun --mpi=pmi2"
    return {**_LAUNCHERS, **_TASK_MANAGERS}[variable]


def _how_to_start(library: str) -> str:
    """In words that follow a colon, for the MPI that is loaded."""
    if "SLURM_JOB_ID" not in os.environ:
        return (
            "start them with the mpirun of the MPI that mpi4py loads (`python -m extrapcomm info` names it), or "
            "install an mpi4py for the launcher's MPI"
        )
    if "Open MPI" in library:
        return "start Open MPI's ranks with its mpirun inside sbatch or salloc; srun can only where --mpi=pmix works"
    if "MPICH" in library or "Intel" in library:
        return "start MPICH's ranks with srun --mpi=pmi2, or with its mpirun inside sbatch or salloc"
    return (
        "start them inside sbatch or salloc with the mpirun of the MPI that mpi4py loads (`python -m extrapcomm info` "
        "names it), or with an srun --mpi=... that this MPI understands (MPICH: pmi2; Open MPI: pmix)"
    )


def _first_line(text: str) -> str:
    return text.split("\0")[0].strip().partition("\n")[0].partition(",")[0]


def cores_here() -> list[int]:
    """The processors that this process is bound to."""
    return sorted(os.sched_getaffinity(0))


def cores_allowed() -> list[int]:
    """The processors that it could be bound to: all that its container, or its batch job, may use."""
    allowed: set[int] = set()

    def ask() -> None:
        """The kernel grants what is allowed of what is asked for; the binding is this thread's and ends with it."""
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
        allowed.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return sorted(allowed)


def memory_domains(cores: list[int]) -> list[int]:
    """The NUMA nodes to which these processors belong; empty if the kernel does not say."""
    nodes = Path("/sys/devices/system/node").glob("node[0-9]*")
    return sorted(int(node.name[4:]) for node in nodes if set(cores) & _processors(node / "cpulist"))


def _processors(file: Path) -> set[int]:
    """The numbers in a list such as 0-3,8."""
    found: set[int] = set()
    for part in _read(str(file)).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


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
