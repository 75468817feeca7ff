"""The model's tensors in the workers' shared memory: their weights, their gradients, and the worker that they show."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from . import _core
from .arrays import copy_into
from .errors import UsageError, describe
from .gradients import MANNERS, Gradients
from .micro_batches import MicroBatches
from .ownership import Ownership, bump_versions, strided

__all__ = ["MANNERS", "Binding", "bump_versions", "strided"]


class Binding:
    """Parameters that lie in an engine's arenas, and show one of this rank's workers at a time.

    Args:
        core: the engine; `copy_initial` and its `adopt` fill it.
        params: the model's parameters in the engine's order.
        names: their names in errors.
        workers: how many workers this rank drives.
        manner: one of MANNERS.
        micro_batches: the counts of each worker's.
        overlapped: whether sums go to other teams during backward.
    """

    def __init__(
        self,
        core: "_core.Engine",
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        workers: int,
        manner: str,
        micro_batches: MicroBatches,
        overlapped: bool = False,
    ) -> None:
        self.core = core
        self.params = list(params)
        self.names = list(names)
        self.index = {id(param): i for i, param in enumerate(self.params)}
        self.ownership = Ownership(core, self.params, self.names, workers)
        self.gradients = Gradients(core, self.params, self.names, workers, manner, micro_batches, overlapped)
        self._pid = os.getpid()

    def require_own_process(self) -> None:
        """Complain in a forked process, before it writes into its parent's memory."""
        if os.getpid() != self._pid:
            raise UsageError(
                "this process was forked from a rank and cannot use its optimizer; use it in the parent only"
            )

    def copy_initial(self) -> None:
        """Put the parameters' values into the first worker's weights."""
        for i, param in enumerate(self.params):
            copy_into(self.core.weights(0, i), param)

    # -- Which worker the model shows ----------------------------------------------------------------------------

    @property
    def bound(self) -> int:
        """The worker whose weights and gradients the model has."""
        return self.ownership.bound

    def show(self, v: int) -> None:
        """Let the model have worker v's weights."""
        self.ownership.show(v)
        self.gradients.bound = v

    def switch(self, v: int, back: bool = False) -> None:
        """Leave the bound worker's gradients in its memory, and give the model worker v's weights and gradients.

        Args:
            v: the worker.
            back: true at the end of a context, which the model leaves even if the gradients cannot be used.

        Raises:
            UsageError: on every rank, if a gradient cannot be used.
        """
        try:
            self.gradients.leave()
        except Exception as error:
            if back:
                self._go_to(v)
            self.core.complain(describe(error))
            raise
        self._go_to(v)

    def _go_to(self, v: int) -> None:
        self.show(v)
        self.gradients.enter()

    # -- Gradients -----------------------------------------------------------------------------------------------

    @property
    def present(self) -> NDArray[np.uint8]:
        """For each worker and parameter, 1 if there is a gradient in the engine's memory."""
        return self.gradients.present

    def forget_gradients(self) -> None:
        """All workers of this rank have none."""
        self.gradients.forget()

    def remove_hooks(self) -> None:
        """Leave the model without traces of this binding."""
        self.gradients.remove_hooks()

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def mark_written(self) -> None:
        """Tell autograd that the weights have changed, so that backward through an old graph raises."""
        self.ownership.mark_written()

    def mark_stepped(self) -> None:
        """The same after a step, before which nobody else had written."""
        self.ownership.mark_stepped()

    def require_own_weights(self, everywhere: bool = False) -> None:
        """Complain if somebody else wrote or replaced a parameter, of the bound worker or of all."""
        self.ownership.require_own(everywhere)

    def kept(self, which: Sequence[int] | None = None) -> AbstractContextManager[list[torch.Tensor]]:
        """Afterwards these parameters, or all, have the values from before, also after an exception."""
        return self.ownership.kept(which)

    def take_over(self) -> None:
        """Copy parameters that were replaced or moved by others into the engine's memory, before an adoption.

        Raises:
            UsageError: if one has another shape or type.
        """
        self.ownership.take_over()
        self.gradients.renew()
