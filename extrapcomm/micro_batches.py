"""Gradient accumulation: how many micro-batches each worker's gradient is the sum of, and how they differ."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch.utils.hooks import unserializable_hook

from .errors import UsageError
from .registered import remove_all, remove_with

__all__ = ["MicroBatches", "MicroSquares"]

# The function that runs each backward pass.
ENGINE = getattr(torch.autograd.graph, "_engine_run_backward", torch.autograd.backward).__code__


class MicroBatches:
    """Counts for each worker the micro-batches beside the last, which needs no announcement.

    Args:
        workers: of this rank.
        how: "mean" or "sum" of them.
    """

    def __init__(self, workers: int, how: str) -> None:
        self._how = how
        self._before_last = [0] * workers
        self._seen: set[int] = set()
        # Within the present no_sync(), by worker and parameter: the backward passes, and what tells the last of them.
        self._passes: dict[tuple[int, int], tuple[int, FrameType | None]] = {}
        self._dropped: set[int] = (
            set()
        )  # workers whose gradients of the present no_sync() were dropped after a pass
        self._most_passes = [1] * workers
        self._broken = [False] * workers  # an exception has left a no_sync() after a backward pass
        self._squares: MicroSquares | None = None
        self.open = False

    def reset(self) -> None:
        """All counts start again, that of the present no_sync() as well if backward passes have come within it."""
        self._dropped |= {worker for worker, _ in self._passes}
        self._passes = {}
        self._before_last = [0] * len(self._before_last)
        self._most_passes = [1] * len(self._before_last)
        self._broken = [False] * len(self._before_last)
        if self._squares is not None:
            self._squares.reset()

    def forget(self, worker: int) -> None:
        """One worker's count starts again, as all do in reset()."""
        passes = {key: value for key, value in self._passes.items() if key[0] != worker}
        if len(passes) < len(self._passes):
            self._dropped.add(worker)
        self._passes = passes
        self._before_last[worker], self._most_passes[worker], self._broken[worker] = 0, 1, False
        if self._squares is not None:
            self._squares.reset()

    def saw(self, worker: int) -> None:
        """The user bound this worker."""
        self._seen.add(worker)

    def passed(self, worker: int, i: int) -> None:
        """A backward pass has brought a gradient of parameter i, one of those that are watched."""
        if not self.open:
            return
        number, last = self._passes.get((worker, i), (0, None))
        outermost = _outermost_pass()
        if outermost is None or outermost is not last:  # else one that is inside another, as by checkpoints
            self._passes[worker, i] = number + 1, outermost

    @property
    def passes_seen(self) -> bool:
        """True if a backward pass has reached a watched parameter within the present no_sync()."""
        return bool(self._passes)

    @property
    def switched(self) -> bool:
        """True if a worker was bound within the present no_sync()."""
        return bool(self._seen)

    def break_off(self, bound: int) -> None:
        """An exception leaves no_sync() after a backward pass of the workers that are bound within, or of this one."""
        for worker in self._seen or {bound}:
            self._broken[worker] = True

    def before_last(self, worker: int) -> int:
        """The number of micro-batches of this worker that were announced."""
        return self._before_last[worker]

    @contextmanager
    def one_more(self, bound: int) -> Iterator[None]:
        """A micro-batch of the workers that are bound within the context, or of the one that is bound anyway."""
        if self.open:
            raise UsageError("no_sync() is already open: leave it after each micro-batch")
        self._seen, self._passes, self._dropped = set(), {}, set()
        self.open = True
        try:
            yield
        finally:
            self.open = False
            passes, self._passes = self._passes, {}
        for worker in self._seen or {bound}:
            # A part of the model may have several passes of its own: count those that reached all that is watched.
            numbers = [number for (who, _), (number, _) in passes.items() if who == worker]
            if worker in self._dropped and not numbers:
                continue
            self._before_last[worker] += 1
            self._most_passes[worker] = max(self._most_passes[worker], min(numbers, default=1))
        if self._squares is not None:
            self._squares.next()

    def count(self) -> int:
        """How many micro-batches each worker has.

        Raises:
            UsageError: if the workers have different numbers, or if the mean is asked for and a no_sync() had several
                backward passes or was left by an exception after one.
        """
        if any(self._broken) and self._how == "mean":
            raise UsageError(
                "an exception left no_sync() after a backward pass, so a part of a micro-batch is in the gradients: "
                "call opt.zero_grad() and begin anew"
            )
        if max(self._most_passes) > 1 and self._how == "mean":
            raise UsageError(
                f"{max(self._most_passes)} backward passes came within one no_sync(), which is one micro-batch of the "
                "mean: open no_sync() for each micro-batch by itself. For several losses of one micro-batch, add them "
                'up and call backward() once, or take accumulation="sum"'
            )
        if len(set(self._before_last)) > 1:
            raise UsageError(
                f"this rank's workers have accumulated {[n + 1 for n in self._before_last]} micro-batches; "
                "all need the same number"
            )
        return 1 + self._before_last[0]

    def divisor(self) -> int:
        """What the sum of the micro-batches is divided by; UsageError as `count`."""
        count = self.count()
        return count if self._how == "mean" else 1

    def watch(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        """Take the squared norms of the micro-batches' own gradients from now on."""
        self.unwatch()
        self._squares = MicroSquares(groups)

    def unwatch(self) -> None:
        """Leave the parameters alone."""
        if self._squares is not None:
            self._squares.remove()
            self._squares = None

    @property
    def squares(self) -> "MicroSquares | None":
        """What is watched."""
        return self._squares


def _outermost_pass() -> FrameType | None:
    """The frame of torch's function that runs the outermost backward pass; None if no Python frame does."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        if frame.f_code is ENGINE:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return found


class MicroSquares:
    """Squared norms of one worker's micro-batches, each by itself.

    Autograd tells a leaf's hooks the gradient of the backward pass that is under way, before it adds it to what has
    been accumulated. So one such pass must bring the whole of a micro-batch.

    Args:
        groups: the parameters, by group.
    """

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        self._params = [param for group in groups for param in group]
        self._group_of = [g for g, group in enumerate(groups) for _ in group]
        self._hooks: dict[int, torch.utils.hooks.RemovableHandle] = {}
        remove_with(self, self._hooks)
        self._sums = [0.0] * len(groups)
        self.reset()

    def reset(self) -> None:
        """No micro-batch has come; parameters that have begun to train are watched, too."""
        self._sums = [0.0] * len(self._sums)
        self._number = 0
        self._last_seen = [-1] * len(self._params)
        self._in_parts = False
        for i in self._unwatched():
            self._hooks[i] = self._params[i].register_hook(_watcher(weakref.ref(self), i))  # type: ignore[no-untyped-call]

    def next(self) -> None:
        """What comes belongs to the next micro-batch."""
        self._number += 1

    def see(self, i: int, grad: torch.Tensor) -> None:
        """A backward pass has brought this gradient of parameter i."""
        if grad.layout is not torch.strided:
            return  # the step refuses it
        self._in_parts |= self._last_seen[i] == self._number
        self._last_seen[i] = self._number
        self._sums[self._group_of[i]] += float(torch.linalg.vector_norm(grad, dtype=torch.float64)) ** 2

    def unscale(self, scale: float) -> None:
        """The gradients were divided by a loss scale after backward()."""
        self._sums = [number / scale**2 for number in self._sums]

    def spread(self, scale: float) -> list[float]:
        """For each group, the sum over the micro-batches of their squared norms, a loss scale taken out.

        Raises:
            UsageError: if they were not seen one by one.
        """
        if self._in_parts:
            raise UsageError(
                "AdaScale on one worker compares its micro-batches, and one came in several backward passes: run "
                "backward() once in each"
            )
        if self._unwatched() or not any(number >= 0 for number in self._last_seen):
            raise UsageError(
                "AdaScale on one worker sees its micro-batches during backward(), and this gradient came otherwise or "
                "belongs to a parameter that was frozen: call zero_grad() before the first backward()"
            )
        return [number / scale**2 for number in self._sums]

    def remove(self) -> None:
        """Leave the parameters without traces."""
        remove_all(self._hooks)

    def _unwatched(self) -> list[int]:
        return [i for i, p in enumerate(self._params) if p.requires_grad and i not in self._hooks]


def _watcher(squares: "weakref.ref[MicroSquares]", i: int) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter; it does not keep the sums alive."""

    def watch(grad: torch.Tensor) -> None:
        mine = squares()
        if mine is not None:
            mine.see(i, grad)

    return unserializable_hook(watch)  # type: ignore[no-any-return, no-untyped-call]
