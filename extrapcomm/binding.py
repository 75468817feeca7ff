"""The model's tensors in the workers' shared memory: which worker they show, their gradients, and who wrote them."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import graph

from . import _core
from .arrays import copy_into, form_of, look_at
from .errors import UsageError
from .micro_batches import MicroBatches
from .modes import outside_inference
from .overlap import Watch

__all__ = ["MANNERS", "Binding", "bump_versions", "strided"]

# How gradients reach shared memory: copied in one batch when the step begins; copied by a hook as soon as autograd has
# each one; or accumulated there by autograd, into zeros that zero_grad() left.
MANNERS = ("copy", "hook", "view")


def bump_versions(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that these tensors were written."""
    graph.increment_version(tensors)


try:
    bump_versions([torch.zeros(0, dtype=torch.float32, device="cpu")])
except Exception:  # torch 2.4 takes one tensor at a time

    def bump_versions(tensors: list[torch.Tensor]) -> None:
        """Tell autograd that these tensors were written."""
        for tensor in tensors:
            graph.increment_version(tensor)


@outside_inference
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
        self.bound = 0
        self._pid = os.getpid()
        self.present = np.zeros((workers, len(self.params)), dtype=np.uint8)
        each = range(len(self.params))
        self._weights = [[look_at(core.weights(v, i), "torch") for i in each] for v in range(workers)]
        self._grads = [[look_at(core.gradients(v, i), "torch") for i in each] for v in range(workers)]
        self._contiguous = all(weights.is_contiguous() for weights in self._weights[0])
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

    def show(self, v: int) -> None:
        """Let the model have worker v's weights."""
        self.bound = v
        for param, weights in zip(self.params, self._weights[v], strict=True):
            param.data = weights
        self.record()

    def switch(self, v: int) -> None:
        """Leave the bound worker's gradients in its memory, and give the model worker v's weights and gradients."""
        self.collect()
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

    def copy_shown_to(self, v: int) -> None:
        """Give worker v's weights the values that the first worker's have."""
        torch._foreach_copy_(self._weights[v], self._weights[0])

    def gradient(self, v: int, i: int) -> torch.Tensor:
        """Worker v's gradient of parameter i in shared memory."""
        mine: torch.Tensor = self._grads[v][i]
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


def _finisher(binding: "weakref.ref[Binding]", i: int, copy: bool) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter; it does not keep the binding alive."""

    def finish(param: torch.Tensor) -> None:
        mine = binding()
        if mine is not None:
            mine.finish_gradient(i, param, copy)

    return finish
