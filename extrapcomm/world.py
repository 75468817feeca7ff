"""The ranks that train together, and how they find each other."""

import atexit
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core, communicators, errors
from .communicators import Line, take_line
from .errors import CommError, PeerError, UsageError
from .launch import require_launchers_mpi, singleton_warning
from .wire import WireOptions, wire_over

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["World", "require_mpi"]

log = logging.getLogger("extrapcomm")

_ON_ITS_WAY = 2.0  # seconds that the last messages of a rank may need after its farewell


class World:
    """The ranks of a communicator, each driving the same number of workers.

    A worker is one copy of the weights and one gradient; K = size x workers of them take part in every mean. Worker
    v of rank r is number r * workers + v. One rank with n workers is the virtual world of tests and laptops: it
    gives the same bits as n ranks with one worker each.

    The ranks of one host are a team and share memory; between teams MPI carries one partial sum of every element and
    brings one new weight back. If every team has the same power of two of workers, in the order of ranks, the bits do
    not depend on how ranks are spread over hosts; `keeps_order` says whether that is so.

    Collective: every rank of `comm` must call it.

    Args:
        comm: an mpi4py intracommunicator; MPI.COMM_WORLD by default. It is duplicated.
        workers: how many workers each rank drives.
        workers_per_team: at most so many workers share memory; the ranks of one host then make several teams, in
            their order. For hosts whose parts are far from each other, and to try on one machine what several do.
        wire: how sums travel between teams.
        step_timeout: seconds that a rank may be late for a step before the others raise PeerError.
        pass_timeout: the same inside a step, when all have come, and in constructions, which all ranks make together.
        warn_after: seconds of waiting after which a warning names who is awaited.

    Attributes:
        rank, size: of the communicator.
        local_rank: this rank's number among those of its host, from 0. With GPUs, before the model is made:
            `torch.cuda.set_device(world.local_rank % torch.cuda.device_count())`.
        teams: the ranks of each team.
        keeps_order: see above.

    Raises:
        UsageError: on every rank, for arguments that cannot be, several teams without a wire for mpi4py's MPI, or a
            launcher of another MPI than mpi4py's if `comm` is not given; on a rank that is not in `comm`; and if MPI
            is not running.
        CommError: if the ranks cannot open each other's memory.

    Example:
        >>> import extrapcomm as xc
        >>> world = xc.World(workers=4)
        >>> world.K == 4 * world.size
        True
        >>> world.close()
    """

    def __init__(
        self,
        comm: "MPI.Intracomm | None" = None,
        workers: int = 1,
        *,
        workers_per_team: int | None = None,
        wire: WireOptions | None = None,
        step_timeout: float = 1800.0,
        pass_timeout: float = 60.0,
        warn_after: float = 60.0,
        provider: str = "memfd",
    ) -> None:
        self._team: _core.Team | None = None
        self._closed = False
        self._pid = os.getpid()
        self._lost: list[Any] = []  # requests that MPI may still complete, with their buffers
        self._timeout = pass_timeout if isinstance(pass_timeout, (int, float)) else 60.0
        if _forked_from_rank:
            raise UsageError(
                "this process was forked from a rank and cannot be one itself: construct in the parent only, or start "
                "processes of their own with multiprocessing's 'spawn'"
            )
        require_mpi()
        self._name = ""  # of the communicator
        self._comm = self._duplicate(comm)
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.workers = workers
        self._line: Line | None = None
        error: Exception | None = None
        try:
            _check_arguments(workers, workers_per_team, (step_timeout, pass_timeout, warn_after), provider)
            if not isinstance(wire, WireOptions | None):
                raise UsageError(f"wire must be WireOptions, not {wire!r}")
            if comm is None:
                require_launchers_mpi(self.size, _library())
        except Exception as caught:
            error = caught
        limit = "" if workers_per_team is None else f", {workers_per_team} per team"
        way = "" if wire is None else f", {wire}"
        self.agree(error, f"World of {workers} workers per rank{limit}{way}")
        if comm is None and (warning := singleton_warning(self.size)):
            log.warning(warning)
        topology = self._find_teams(workers_per_team)
        several = len(topology.teams) > 1
        self._team = _core.Team(
            topology=topology,
            wire=self._make_wire() if several else None,
            world=self._line.worlds if self._line else 0,
            first_channel=self._line.channels if self._line else 0,
            rails=(wire or WireOptions()).for_core(),
            all_gather=_gathering_for(self),
            warn=log.warning,
            step_timeout=step_timeout,
            pass_timeout=pass_timeout,
            warn_after=warn_after,
            provider=provider,
        )
        self._members: list[int] = next(team for team in topology.teams if self.rank in team)
        self.teams: list[list[int]] = topology.teams
        self.keeps_order: bool = topology.keeps_order
        _open_worlds.add(self)
        _speak_of_uncaught_exceptions()

    @property
    def comm(self) -> "MPI.Intracomm":
        """The duplicate of the communicator; UsageError once MPI is finalized."""
        require_mpi()
        return self._comm

    @property
    def K(self) -> int:
        """The number of workers of all ranks."""
        return self.size * self.workers

    @property
    def team(self) -> _core.Team:
        """The compiled half; UsageError once the world is closed."""
        if self._team is None:
            raise UsageError("this world is closed")
        return self._team

    def agree(self, error: Exception | None, what: str) -> None:
        """Collective: raise the same error on every rank if any rank brings one, that of the lowest such rank.

        Errors of other kinds than extrapcomm's own become a UsageError.

        Args:
            error: what this rank found wrong, or None.
            what: what this rank is about to make; MismatchError if another makes something else.

        Raises:
            UsageError: at once in a forked process and in a closed world.
        """
        self._require_member()
        if self.size == 1 and error:
            if isinstance(error, errors.Error):
                raise error
            raise UsageError(errors.describe(error)) from error
        mine = f"{type(error).__name__}\0{errors.describe(error)}" if error else f"\0{what}"
        texts = self.gather_words(mine)
        for rank, text in enumerate(texts):
            kind, _, words = text.partition("\0")
            if kind:
                raise errors.of_kind(kind, f"rank {rank}: {words}") from error
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise errors.MismatchError(
                    f"every rank must construct the same things in the same order: rank 0 makes a {texts[0][1:]}, "
                    f"rank {rank} a {text[1:]}"
                )

    def gather_words(self, mine: str) -> list[str]:
        """Collective: what every rank brings, in the order of ranks."""
        return [text.decode() for text in self._all_gather(mine.encode())]

    def close(self) -> None:
        """Say good-bye: ranks that wait for this one raise PeerError. Engines of this world take no more steps.

        Not collective and idempotent; weights stay readable as long as anything looks at them.
        """
        self._leave(sys.exc_info()[1])
        self._retire()
        communicators.free_alone()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Say good-bye as `close()` does. This may run at any moment."""
        if finalizing() or not hasattr(self, "_comm") or os.getpid() != self._pid:
            return
        self._leave(None)
        self._retire()
        _unfinished.extend(self._lost)

    def _retire(self) -> None:
        """Once: let the communicator be freed in its time, unless something was begun there and not done."""
        name, self._name = self._name, ""
        if name and not self._lost and os.getpid() == self._pid:
            communicators.retire(name, self._comm)

    def _require_member(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"this process was forked from rank {self.rank} and cannot take part in its collectives"
            )
        if self._closed:
            raise UsageError("this world is closed")

    def _leave(self, error: BaseException | None = None) -> None:
        """Say good-bye, and which exception is on its way, if one is."""
        self._closed = True
        if self._team is None:
            return
        self._team.leave(_words(error))
        if self._line:
            self._line.channels, self._line.taken = self._team.channels, False
        self._team = None
        _open_worlds.discard(self)

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"World(rank={self.rank}, size={self.size}, workers={self.workers})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("a World cannot be copied or pickled; make one in each rank")

    def _duplicate(self, comm: "MPI.Intracomm | None") -> "MPI.Intracomm":
        from mpi4py import MPI

        comm = MPI.COMM_WORLD if comm is None else comm
        if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
            raise UsageError(
                "comm is MPI.COMM_NULL: this rank is not in that communicator (Split or Create left it out), or the "
                "communicator was freed; make the World on the ranks that are in it, and let the others do without"
            )
        if not isinstance(comm, MPI.Intracomm):
            raise UsageError(f"comm must be an mpi4py intracommunicator, not {comm!r}")
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm = self._copy(comm)
        self._name = self.gather_words(communicators.new_name())[0]
        communicators.free_retired(self._comm, self._all_gather)
        return self._comm

    def _copy(self, comm: "MPI.Intracomm") -> "MPI.Intracomm":
        duplicate, request = comm.Idup()
        self._wait(request, duplicate)
        return duplicate

    def _find_teams(self, workers_per_team: int | None) -> _core.Topology:
        """Ranks that say the same of their host: the boot of its kernel, and its name, which containers may have."""
        places = self.gather_words(f"{_boot_id()} {os.uname().nodename}")
        self.local_rank: int = places[: self.rank].count(places[self.rank])
        hosts: dict[str, list[int]] = {}
        for rank, place in enumerate(places):
            hosts.setdefault(place, []).append(rank)
        most = self.size if workers_per_team is None else workers_per_team // self.workers
        teams = [ranks[i : i + most] for ranks in hosts.values() for i in range(0, len(ranks), most)]
        names = [place.split(maxsplit=1)[1] for place in places]
        return _core.Topology(rank=self.rank, workers=self.workers, teams=sorted(teams), hosts=names)

    def _make_wire(self) -> _core.Wire:
        error: Exception | None = None
        self._line = take_line(self._comm, self._all_gather, lambda: self._copy(self._comm))
        try:
            wire = wire_over(self._line.comm)
        except Exception as caught:
            error = caught
            self._line.taken = False
        self.agree(error, "wire")
        return wire

    def _all_gather(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in the order of ranks; bounded in time and watching for dead peers."""
        if self.size == 1:
            return [mine]
        from mpi4py import MPI

        if self._lost:
            raise CommError("an earlier collective construction of this world was not completed by all ranks")
        counts = np.empty(self.size, dtype=np.int64)
        length = np.array([len(mine)], dtype=np.int64)
        comm = self.comm
        self._wait(comm.Iallgather(length, counts), length, counts)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        sent = np.frombuffer(mine, dtype=np.uint8)
        everything = np.empty(int(counts.sum()), dtype=np.uint8)
        request = comm.Iallgatherv([sent, MPI.BYTE], [everything, counts, starts, MPI.BYTE])
        self._wait(request, sent, everything, counts, starts)
        return [
            everything[start : start + count].tobytes() for start, count in zip(starts, counts, strict=True)
        ]

    def _wait(self, request: "MPI.Request", *buffers: Any) -> None:
        try:
            self._wait_bounded(request)
        except BaseException:
            self._lost.append((request, buffers))
            raise

    def _wait_bounded(self, request: "MPI.Request") -> None:
        since = time.monotonic()
        next_look = since + 0.2
        while not request.Test():
            now = time.monotonic()
            if now > next_look:
                self._look_for_missing(request)
                next_look = now + 0.2
            if now - since > self._timeout:
                raise CommError(
                    f"rank {self.rank} waited {self._timeout:g} s for the other ranks to make the same collective "
                    "call; every rank must construct worlds, engines and arrays in the same order"
                )
            if now - since > 1e-3:
                time.sleep(2e-4)

    def _look_for_missing(self, request: "MPI.Request") -> None:
        """A peer that is gone for good will not complete the request."""
        if self._team is None:
            return
        since = time.monotonic()
        elsewhere = self._team.departure_elsewhere()
        while elsewhere and time.monotonic() - since < _ON_ITS_WAY and not request.Test():
            time.sleep(1e-3)
        if elsewhere and not request.Test():
            rank, reason = elsewhere
            how = f"ended with {reason}" if reason else "left"
            raise PeerError(f"rank {rank} {how}, before a collective construction", rank, 0, "left", reason)
        for place, rank in enumerate(self._members):
            departed = self._team.departed(place)
            if (not departed and self._team.alive(place)) or request.Test():
                continue
            reason = self._team.farewell(place)
            how = f"ended with {reason}" if reason else "left or died"
            kind = "left" if departed else "died"
            raise PeerError(f"rank {rank} {how}, before a collective construction", rank, 0, kind, reason)


def _check_arguments(workers: Any, workers_per_team: Any, timeouts: tuple[float, ...], provider: str) -> None:
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise UsageError(f"workers must be a whole number of at least 1, not {workers!r}")
    whole = isinstance(workers_per_team, int) and not isinstance(workers_per_team, bool)
    if workers_per_team is not None and (not whole or workers_per_team < 1 or workers_per_team % workers):
        raise UsageError(
            f"workers_per_team must be a multiple of the {workers} workers of each rank, not {workers_per_team!r}"
        )
    if any(not float(seconds) > 0 for seconds in timeouts):
        raise UsageError("timeouts must be positive numbers of seconds")
    if provider not in ("memfd", "posix"):
        raise UsageError(f"provider must be 'memfd' or 'posix', not {provider!r}")


def _library() -> str:
    from mpi4py import MPI

    return MPI.Get_library_version()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


_forked_from_rank = False


def _note_fork() -> None:
    """In a forked child: MPI takes it for its parent."""
    global _forked_from_rank
    mpi = sys.modules.get("mpi4py.MPI")
    _forked_from_rank = _forked_from_rank or (mpi is not None and mpi.Is_initialized())


os.register_at_fork(after_in_child=_note_fork)


def require_mpi() -> None:
    """UsageError unless MPI is running: most of its calls would end the whole job."""
    from mpi4py import MPI

    if not MPI.Is_initialized():
        raise UsageError(
            "MPI is not initialized: call MPI.Init() first, or leave mpi4py.rc.initialize at its default, True"
        )
    if MPI.Is_finalized():
        raise UsageError(
            "MPI was finalized, and nothing that needs other ranks can be done any more: call MPI.Finalize() last, or "
            "leave it to mpi4py"
        )


_unfinished: list[Any] = []  # requests of dropped worlds, with their buffers: MPI may still write there


def _gathering_for(world: World) -> Callable[[bytes], list[bytes]]:
    """The world's exchange for its compiled half, whose references the garbage collector does not see."""
    reference = weakref.ref(world)

    def all_gather(mine: bytes) -> list[bytes]:
        if (living := reference()) is None:
            raise UsageError("this world was dropped")
        return living._all_gather(mine)

    return all_gather


# A program that ends, in whatever way runs exit handlers, tells its peers; MPI is still up when these run.
_open_worlds: "weakref.WeakSet[World]" = weakref.WeakSet()


@atexit.register
def _leave_all(error: BaseException | None = None) -> None:
    for world in list(_open_worlds):
        world._leave(error or sys.exc_info()[1])


def _words(error: BaseException | None) -> str:
    """An exception in words that every rank can take."""
    if error is None:
        return ""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _speak_of_uncaught_exceptions() -> None:
    """Once: let peers learn at once what ended this rank, and let only the rank that began show a traceback."""
    shown = sys.excepthook
    if getattr(shown, "__module__", "") == __name__:
        return

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if hasattr(sys, "ps1") or sys.flags.interactive:
            shown(kind, error, trace)  # at a prompt the program goes on
            return
        _leave_all(error)
        if isinstance(error, PeerError) and error.reason:
            print(f"{kind.__name__}: {error}", file=sys.stderr)
        else:
            shown(kind, error, trace)
        if isinstance(error, PeerError) and error.kind in ("died", "silent"):
            _abort()

    sys.excepthook = tell


def _abort() -> None:
    """End the job: MPI's own ending would wait for a rank that does not come."""
    from mpi4py import MPI

    sys.stdout.flush()
    sys.stderr.flush()
    if not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(1)
