"""Communicators that outlive a world: for a message that nobody takes, MPI must not find another one in their place.

Whoever leaves a world does so alone, while others may still send on its communicators. MPI frees a communicator in
each process by itself, and gives its number to the next: there a late message would be taken for one of the new
communicator's, and Open MPI then ends the job.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Line", "free_retired", "new_name", "retire", "take_line"]


# ---- of worlds: freed when all ranks have left ----

_retired: dict[str, "MPI.Intracomm"] = {}  # by a name that all its ranks know


def new_name() -> str:
    """For one communicator; rank 0's counts."""
    return secrets.token_hex(8)


def retire(name: str, comm: "MPI.Intracomm") -> None:
    """This rank has left `comm`, with all it began there done. Makes no call of MPI."""
    _retired[name] = comm


def free_retired(comm: "MPI.Intracomm", all_gather: Callable[[bytes], list[bytes]]) -> None:
    """Collective: free what all ranks of `comm` have retired: each has what was sent to it there."""
    from mpi4py import MPI

    free_alone()
    group = comm.Get_group()
    mine = [name for name, old in _now() if MPI.Group.Compare(old.Get_group(), group) != MPI.UNEQUAL]
    offers = [set(offer.decode().split()) for offer in all_gather(" ".join(mine).encode())]
    for name in sorted(set.intersection(*offers)):
        _retired.pop(name).Free()


def free_alone() -> None:
    """Free what this rank has retired and no other is in."""
    from mpi4py import MPI

    for name, old in [] if MPI.Is_finalized() else _now():
        if old.Get_size() == 1:
            _retired.pop(name).Free()


def _now() -> list[tuple[str, "MPI.Intracomm"]]:
    """The retired ones; the garbage collector may retire more at any moment."""
    return list(_retired.copy().items())


# ---- of wires: used again ----


@dataclass
class Line:
    """A communicator for wires alone. It is never freed, but used again by the next world of the same processes.

    A rank that leaves says so to ranks that may not be listening any more. Channels go on counting, so old messages
    are not taken for new ones.
    """

    comm: "MPI.Intracomm"
    number: int
    channels: int = 0
    worlds: int = 0
    taken: bool = True


_lines: dict[tuple[int, ...], list[Line]] = {}


def take_line(
    comm: "MPI.Intracomm",
    all_gather: Callable[[bytes], list[bytes]],
    duplicate: Callable[[], "MPI.Intracomm"],
) -> Line:
    """Collective: a line of the communicator's processes that is free on all of them, or a new one."""
    from mpi4py import MPI

    group, whole = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    lines = _lines.setdefault(tuple(group.Translate_ranks(None, whole)), [])
    free = [line for line in lines if not line.taken]
    mine = (free[0].number, free[0].channels) if free else (-1, 0)
    offers = [tuple(map(int, offer.split())) for offer in all_gather(f"{mine[0]} {mine[1]}".encode())]
    if free and {number for number, _ in offers} == {free[0].number}:
        line = free[0]
        line.taken, line.worlds = True, line.worlds + 1
        line.channels = max(channels for _, channels in offers)  # a failed construction may have opened some
        return line
    numbers = all_gather(str(max((line.number for line in lines), default=-1) + 1).encode())
    lines.append(Line(duplicate(), max(int(number) for number in numbers)))
    return lines[-1]
