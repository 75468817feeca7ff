"""Sums that go to other teams while backward is running: what the engine is told of the gradients meanwhile."""

from collections.abc import Sequence

import torch

from . import _core
from .micro_batches import MicroBatches

__all__ = ["Watch"]


class Watch:
    """Tells the engine which gradients have come, and at the step which of them are no longer the same.

    Args:
        core: the engine.
        grads: for each of this rank's workers, its gradients in shared memory.
        micro_batches: only the last of them ends a gradient.
    """

    def __init__(
        self, core: "_core.Engine", grads: Sequence[Sequence[torch.Tensor]], micro_batches: MicroBatches
    ) -> None:
        self._core = core
        self._grads = grads
        self._micro_batches = micro_batches
        self._versions: dict[tuple[int, int], int] = {}
        self._late: set[tuple[int, int]] = set()  # came within no_sync() after others were finished

    def finish(self, worker: int, i: int) -> None:
        """A backward pass has brought this gradient into shared memory; moves what is on its way."""
        if self._micro_batches.open:
            if self._versions:  # a bucket that did not wait for this one may have been sent
                self._late.add((worker, i))
            return
        self._versions[worker, i] = self._grads[worker][i]._version
        self._core.finished(worker, i)

    def report(self) -> None:
        """Name what was written after it was finished; what was dropped or replaced the engine sees itself."""
        for (worker, i), version in self._versions.items():
            if self._grads[worker][i]._version != version:
                self._core.changed(worker, i)
        for worker, i in self._late:
            self._core.changed(worker, i)

    def forget(self) -> None:
        """The step was taken."""
        self._versions.clear()
        self._late.clear()
