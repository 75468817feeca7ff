"""Gradients that were dropped for one worker alone, as `model.zero_grad()` does."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch.utils.hooks import unserializable_hook

from .errors import UsageError
from .micro_batches import MicroBatches
from .registered import remove_all, remove_with

__all__ = ["Witnesses", "version_of"]

PARTS = 3  # of the model, each with two witnesses
SAMPLES = 1024  # elements of a gradient at most


class Witnesses:
    """Notices that all gradients of the bound worker vanished, while something else was kept that belongs to them.

    `model.zero_grad()` reaches the gradients of the worker that the model shows. Those of this rank's other workers,
    and the counts of micro-batches, stay; so the next step would add old gradients to new ones, or divide by too
    much. A few parameters are the witnesses, the smallest and the largest in each part of the model, because somebody
    may drop the gradients of some layers, or of all biases, for good reasons. A witness's gradient vanished if it is
    None now, or if the same tensor, which held something, was made all zeros by others than autograd. Just before
    autograd adds to it is the last moment to see that. A worker whose gradients are dropped in its own turn, as
    others' were, has lost nothing.

    Args:
        params: the parameters.
        workers: how many workers this rank drives.
        micro_batches: their counts, by worker.
    """

    def __init__(self, params: Sequence[torch.Tensor], workers: int, micro_batches: MicroBatches) -> None:
        self._params = params
        self._micro_batches = micro_batches
        self._bound = 0
        self._hooks: dict[int, torch.utils.hooks.RemovableHandle] = {}
        remove_with(self, self._hooks)
        # Their gradients, each with the version that it has as long as nobody but autograd writes into it.
        self._noted: list[dict[int, tuple[torch.Tensor, int]]] = [{} for _ in range(workers)]
        self.forget()

    def forget(self) -> None:
        """All gradients of all workers were dropped, and the counts of micro-batches."""
        workers = len(self._noted)
        self._noted = [{} for _ in range(workers)]
        self._vanished: list[set[int]] = [set() for _ in range(workers)]
        self._restart()

    def forget_some(self, which: Sequence[int]) -> None:
        """The gradients of these parameters were dropped with all workers, by what knows the counts."""
        for noted, vanished in zip(self._noted, self._vanished, strict=True):
            for i in which:
                noted.pop(i, None)
                vanished.discard(i)

    def forget_bound(self, which: Sequence[int]) -> None:
        """The bound worker's gradients of these parameters were dropped in its own turn; other workers keep theirs."""
        noted, vanished = self._noted[self._bound], self._vanished[self._bound]
        for i in which:
            noted.pop(i, None)
            vanished.discard(i)

    def _restart(self) -> None:
        self._dropped = [False] * len(self._noted)  # its gradients vanished, once or more
        self._stale = [False] * len(self._noted)  # it kept its gradients when another's vanished
        self._lost: int | None = None  # a worker whose gradients vanished, but not the count of them

    def step_taken(self) -> None:
        """The counts of micro-batches are gone; gradients are still there."""
        if len(self._noted) == 1:
            self.forget()
        else:
            self._restart()
            self.note(self._bound)

    def note(self, v: int) -> None:
        """Remember that worker v, which is bound, has gradients, if it has."""
        chosen = {pick(part, key=self._size_of) for part in self._parts() if part for pick in (min, max)}
        grads = {i: self._params[i].grad for i in chosen}
        self._noted[v] = {
            i: (grad, version_of(grad)) for i, grad in grads.items() if grad is not None and _holds(grad)
        }
        self._vanished[v].clear()
        for i in self._noted[v].keys() - self._hooks.keys():
            if self._params[i].requires_grad:
                self._hooks[i] = self._params[i].register_hook(_seer(weakref.ref(self), i))  # type: ignore[no-untyped-call]

    def _parts(self) -> list[list[int]]:
        """The indices of the parameters that have a gradient, in parts."""
        there = [i for i, param in enumerate(self._params) if param.numel() > 0 and param.grad is not None]
        size = -(-len(there) // PARTS)
        return [there[k * size : (k + 1) * size] for k in range(PARTS)]

    def _size_of(self, i: int) -> int:
        return self._params[i].numel()

    def rebind(self, v: int) -> None:
        """The model shows worker v: its gradients are other tensors now."""
        self._bound = v
        grads = {i: self._params[i].grad for i in self._noted[v]}
        self._noted[v] = {i: (grad, version_of(grad)) for i, grad in grads.items() if grad is not None}

    def see(self, i: int) -> None:
        """Autograd is about to add to this parameter's gradient."""
        self._look([i])
        noted = self._noted[self._bound]
        if i in noted and i not in self._vanished[self._bound]:
            grad, _ = noted[i]
            noted[i] = grad, version_of(grad) + 1

    def check(self) -> None:
        """Look for the bound worker's gradients now."""
        if self._noted[self._bound]:
            self._look(list(self._noted[self._bound]))

    def _look(self, which: Sequence[int]) -> None:
        v = self._bound
        noted, vanished = self._noted[v], self._vanished[v]
        vanished.update(i for i in which if i in noted and self._has_vanished(i, noted[i]))
        if noted and len(vanished) == len(noted):
            self._drop(v)

    def _has_vanished(self, i: int, noted: tuple[torch.Tensor, int]) -> bool:
        grad, (before, version) = self._params[i].grad, noted
        if grad is None:
            return True
        return grad is before and version_of(grad) != version and not _holds(grad)

    def _drop(self, v: int) -> None:
        """All of worker v's witnesses agree."""
        if self._micro_batches.before_last(v) > 0:
            self._lost = v
        self._dropped[v], self._stale[v] = True, False
        for other, noted in enumerate(self._noted):
            if noted and not self._dropped[other]:
                self._stale[other] = True
        self._noted[v] = {}
        self._vanished[v].clear()

    def require_whole(self) -> None:
        """UsageError if gradients were dropped without what belongs to them."""
        advice = (
            "call opt.zero_grad(), which forgets the gradients of all workers and the count of micro-batches, or "
            "opt.attach(model), after which model.zero_grad() does so"
        )
        if self._lost is not None:
            raise UsageError(
                f"the gradients of worker {self._lost} of this rank were dropped after no_sync(), as by "
                f"model.zero_grad(), but its micro-batches are still counted: {advice}"
            )
        if any(self._stale):
            dropped, stale = self._dropped.index(True), self._stale.index(True)
            raise UsageError(
                f"the gradients of worker {dropped} of this rank were dropped, as by model.zero_grad(), but worker "
                f"{stale} still has its old ones: {advice}"
            )

    def remove(self) -> None:
        """Leave the parameters without traces."""
        self.forget()
        remove_all(self._hooks)


def version_of(grad: torch.Tensor) -> int:
    """The number of writes into a gradient; 0 for those that have none."""
    return 0 if grad.is_inference() else grad._version


def _holds(grad: torch.Tensor) -> bool:
    """Return true if some elements of a gradient are not all zeros. A device is not asked: the host would wait."""
    if grad.device.type != "cpu" or grad.layout != torch.strided:
        return True
    elements = grad.detach()
    if grad.is_contiguous():
        elements = elements.view(-1)[:: -(-grad.numel() // SAMPLES)]
    return grad.numel() > 0 and bool(elements.any())


def _seer(witnesses: "weakref.ref[Witnesses]", i: int) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter; it does not keep the witnesses alive."""

    def see(_: torch.Tensor) -> None:
        mine = witnesses()
        if mine is not None:
            mine.see(i)

    return unserializable_hook(see)  # type: ignore[no-any-return, no-untyped-call]
