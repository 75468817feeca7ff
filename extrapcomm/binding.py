"""The model's tensors in the workers' shared memory: which worker they show, and who wrote them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import graph

from . import _core
from .arrays import copy_into, form_of, look_at
from .errors import UsageError, describe
from .gradients import Gradients
from .micro_batches import MicroBatches

__all__ = ["Binding", "bump_versions", "strided"]


def bump_versions(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that these tensors were written."""
    graph.increment_version(tensors)


try:
    bump_versions([torch.zeros(0)])
except Exception:  # torch 2.4 takes one tensor at a time

    def bump_versions(tensors: list[torch.Tensor]) -> None:
        """Tell autograd that these tensors were written."""
        for tensor in tensors:
            graph.increment_version(tensor)


def strided(flat: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """An array in the order of memory as a tensor of the parameter's shape and strides."""
    return torch.from_numpy(flat).as_strided(like.shape, like.stride())


class Binding:
    """Parameters that lie in an engine's arenas, and show one of this rank's workers at a time.

    Args:
        core: the engine; `copy_initial` and its `adopt` fill it.
        params: the model's parameters in the engine's order.
        names: what errors call them.
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
        self._pid = os.getpid()
        each = range(len(self.params))
        self._weights = [[look_at(core.weights(v, i), "torch") for i in each] for v in range(workers)]
        self.gradients = Gradients(core, self.params, self.names, workers, manner, micro_batches, overlapped)

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

    def show(self, v: int) -> None:
        """Let the model have worker v's weights."""
        self.bound = v
        for param, weights in zip(self.params, self._weights[v], strict=True):
            param.data = weights
        self.record()

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
    def bound(self) -> int:
        """The worker that the model shows."""
        return self.gradients.bound

    @bound.setter
    def bound(self, v: int) -> None:
        self.gradients.bound = v

    @property
    def present(self) -> NDArray[np.uint8]:
        """For each worker and parameter, 1 if there is a gradient in the engine's memory."""
        return self.gradients.present

    def copy_shown_to(self, v: int) -> None:
        """Give worker v's weights the values that the first worker's have."""
        torch._foreach_copy_(self._weights[v], self._weights[0])

    def forget_gradients(self) -> None:
        """All workers of this rank have none."""
        self.gradients.forget()

    def remove_hooks(self) -> None:
        """Leave the model without traces of this binding."""
        self.gradients.remove_hooks()

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def record(self) -> None:
        """Remember how the parameters look now, to notice what others write into them."""
        self._versions = [param._version for param in self.params]
        self._addresses = [param.data_ptr() for param in self.params]

    def mark_written(self) -> None:
        """Tell autograd that the weights have changed, so that backward through an old graph raises."""
        bump_versions(self.params)
        self._versions = [param._version for param in self.params]

    def require_own_weights(self) -> None:
        """Complain if somebody else wrote or replaced a parameter."""
        if self.is_own():
            return
        looks = zip(self.params, self._versions, self._addresses, strict=True)
        changed = next(i for i, (p, v, a) in enumerate(looks) if p._version != v or p.data_ptr() != a)
        raise UsageError(
            f"parameter {self.names[changed]!r} was written or replaced outside the optimizer, and the next step "
            "would lose that: call opt.adopt() after changing weights, or change them in master_weights(write=True)"
        )

    @contextmanager
    def kept(self, which: Sequence[int] | None = None) -> Iterator[None]:
        """Afterwards these parameters, or all, have the values from before, also after an exception."""
        kept = [self.params[i] for i in (range(len(self.params)) if which is None else which)]
        values = [param.detach().clone() for param in kept]
        try:
            yield
        finally:
            for param, value in zip(kept, values, strict=True):
                param.data.copy_(value)

    def is_own(self) -> bool:
        """Whether nobody else wrote or replaced a parameter."""
        versions = [param._version for param in self.params]
        addresses = [param.data_ptr() for param in self.params]
        return versions == self._versions and addresses == self._addresses

    def take_over(self) -> None:
        """Copy parameters that were replaced by others into the first worker's weights.

        Raises:
            UsageError: if one has another shape or type.
        """
        for i, (param, mine) in enumerate(zip(self.params, self._weights[0], strict=True)):
            if param.data_ptr() == mine.data_ptr():
                continue
            if (
                param.shape != mine.shape
                or form_of(param, self.names[i]).dtype != self.core.weights(0, i).dtype
            ):
                raise UsageError(f"parameter {self.names[i]!r} was replaced by one of another shape or type")
            mine.copy_(param.detach())
            param.data = mine
