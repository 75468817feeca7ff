"""The model's tensors in the workers' shared memory: their gradients, and the worker that they show."""

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import compress
from typing import Any

import numpy as np
import torch

from . import _core
from .arrays import copy_into
from .errors import UsageError
from .micro_batches import MicroBatches
from .overlap import Watch
from .ownership import Ownership, Views, bump_versions, strided

__all__ = ["MANNERS", "Binding", "bump_versions", "strided"]

# How gradients reach shared memory: copied in one batch when the step begins; copied by a hook as soon as autograd has
# each one; or accumulated there by autograd, into zeros that zero_grad() left.
MANNERS = ("copy", "hook", "view")


class Binding:
    """Parameters that lie in an engine's arenas, and show one of this rank's workers at a time.

    Args:
        core: the engine; `copy_initial` and its `adopt` fill it.
        params: the model's parameters in the engine's order.
        names: what errors call them.
        workers: how many workers this rank drives.
        manner: one of MANNERS.
        overlapped: whose sums go to other teams during backward: the micro-batches of these gradients; or None.
    """

    def __init__(
        self,
        core: "_core.Engine",
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        workers: int,
        manner: str,
        overlapped: MicroBatches | None = None,
    ) -> None:
        self.core = core
        self.params = list(params)
        self.names = list(names)
        self.index = {id(param): i for i, param in enumerate(self.params)}
        self.ownership = Ownership(core, self.params, self.names, workers)
        self._pid = os.getpid()
        self.present = np.zeros((workers, len(self.params)), dtype=np.uint8)
        self._gradient_views = [
            Views(lambda i, v=v: core.gradients(v, i), len(self.params))  # type: ignore[misc]
            for v in range(workers)
        ]
        self._grads = [views.tensors for views in self._gradient_views]
        self._contiguous = all(weights.is_contiguous() for weights in self.ownership.weights)
        self._finished: tuple[torch.Tensor, int] | None = None
        self._rescaled = False
        self._watched = next((i for i, param in enumerate(self.params) if param.requires_grad), -1)
        self._watch_all = None if overlapped is None else Watch(core, self._grads, overlapped)
        self._hooks = self._install_hooks(everywhere=manner == "hook" or overlapped is not None)

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

    def switch(self, v: int) -> None:
        """Leave the bound worker's gradients in its memory, and give the model worker v's weights and gradients."""
        self.collect()
        self._gradient_views[self.bound].renew()
        self.was_rescaled()
        self.show(v)
        self.point_gradients()
        if self._watched >= 0:
            self._watch(self.params[self._watched].grad)

    def point_gradients(self) -> None:
        """Let `.grad` be the bound worker's gradients, where it has one."""
        for param, grad, here in zip(
            self.params, self._grads[self.bound], self.present[self.bound], strict=True
        ):
            param.grad = grad if here else None

    # -- Gradients -----------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Bring the gradients that autograd made for the bound worker into its shared memory, in one batch."""
        grads = [param.grad for param in self.params]
        try:
            if not (self._contiguous and all(grad is None or grad.is_contiguous() for grad in grads)):
                grads = [None if g is None else self._laid_out(i, g) for i, g in enumerate(grads)]
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        except RuntimeError as error:  # sparse tensors have neither strides nor one address
            raise UsageError("a gradient is sparse; use dense ones (sparse=False in Embedding)") from error
        self.core.gather(self.bound, addresses, self.present[self.bound])

    def _laid_out(self, i: int, grad: torch.Tensor) -> torch.Tensor:
        """The gradient with its parameter's strides: itself, or a copy in shared memory."""
        mine: torch.Tensor = self._grads[self.bound][i]
        if grad.stride() == mine.stride():
            return grad
        self.core.touch(self.bound, i)
        mine.copy_(grad)
        return mine

    def forget_gradients(self) -> None:
        """All workers of this rank have none."""
        self.present[:] = 0
        for param in self.params:
            param.grad = None

    def zero_gradients(self) -> None:
        """What gradients there are become zeros in shared memory, where the next backward pass adds to them."""
        self.present[self.bound] = [param.grad is not None for param in self.params]
        workers = zip(self.present, self._grads, strict=True)
        if filled := [grad for here, grads in workers for grad in compress(grads, here)]:
            torch._foreach_zero_(filled)
        self.point_gradients()

    def _install_hooks(self, everywhere: bool) -> list[Any]:
        """On every parameter, or on the one that is watched."""
        mine = weakref.ref(self)
        return [
            param.register_post_accumulate_grad_hook(_finisher(mine, i, everywhere))  # type: ignore[no-untyped-call]
            for i, param in enumerate(self.params)
            if param.requires_grad and (everywhere or i == self._watched)
        ]

    def finish_gradient(self, i: int, param: torch.Tensor, copy: bool) -> None:
        """Autograd has accumulated into this parameter's gradient."""
        if param.grad is None:
            return
        mine = self._grads[self.bound][i]
        if os.getpid() != self._pid:
            return  # a forked process has gradients of its own
        own = param.grad.is_sparse or param.grad.requires_grad  # the user's to handle, or part of a graph
        if copy and not own and param.grad.data_ptr() != mine.data_ptr():
            self.core.touch(self.bound, i)
            param.grad = mine.copy_(param.grad)
        if i == self._watched:
            self._watch(param.grad)
        if self._watch_all is not None and not own:
            self._watch_all.finish(self.bound, i)

    def report_changes(self) -> None:
        """Tell the engine what was written into gradients whose sums may be with other teams already."""
        if self._watch_all is not None:
            self._watch_all.report()

    def forget_finished(self) -> None:
        """The step was taken, so what is finished from now on belongs to the next."""
        if self._watch_all is not None:
            self._watch_all.forget()

    def _watch(self, grad: torch.Tensor | None) -> None:
        self._finished = None if grad is None else (grad, grad._version)

    def watch_again(self) -> None:
        """What was written into the gradients until now was meant."""
        if self._watched >= 0:
            self._watch(self.params[self._watched].grad)

    def forget_rescaling(self) -> None:
        """Later writes into the gradients are nobody's mistake."""
        self._finished = None
        self._rescaled = False

    def was_rescaled(self) -> bool:
        """Whether somebody wrote into a gradient after autograd had finished it."""
        if self._finished is not None:
            grad, version = self._finished
            self._rescaled |= grad._version != version
        return self._rescaled

    def remove_hooks(self) -> None:
        """Leave the model without traces of this binding."""
        for hook in self._hooks:
            hook.remove()

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def mark_written(self) -> None:
        """Tell autograd that the weights have changed, so that backward through an old graph raises."""
        self.ownership.mark_written()

    def require_own_weights(self, everywhere: bool = False) -> None:
        """Complain if somebody else wrote or replaced a parameter, of the bound worker or of all."""
        self.ownership.require_own(everywhere)

    def kept(self, which: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Afterwards these parameters, or all, have the values from before, also after an exception."""
        return self.ownership.kept(which)

    def take_over(self) -> None:
        """Copy parameters that were replaced or moved by others into the engine's memory, before an adoption.

        Raises:
            UsageError: if one has another shape or type.
        """
        self.ownership.take_over()
        for views in self._gradient_views:
            views.renew()


def _finisher(binding: "weakref.ref[Binding]", i: int, copy: bool) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter; it does not keep the binding alive."""

    def finish(param: torch.Tensor) -> None:
        mine = binding()
        if mine is not None:
            mine.finish_gradient(i, param, copy)

    return finish
