"""The gradients of a model whose weights lie in an engine's memory: how they come there, and who else holds them."""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import unserializable_hook

from . import _core
from .arrays import look_at
from .errors import UsageError
from .micro_batches import MicroBatches
from .odd_gradients import held_alone, is_held, is_plain_class, looks_at, reader_for, require_usable
from .overlap import Watch
from .ownership import Views
from .registered import remove_all, remove_with
from .witnesses import Witnesses, version_of

__all__ = ["MANNERS", "Gradients"]

# The modes in which gradients reach shared memory: copied in one batch when the step begins; copied by a hook as soon
# as autograd has each one; or accumulated there by autograd, into zeros that zero_grad() left.
MANNERS = ("copy", "hook", "view")

SAMPLES = 64  # elements of a gradient at most, which tell whether it was scaled


class Gradients:
    """`.grad` of the parameters, and for each of this rank's workers the memory that the engine reads.

    A gradient may be any tensor that torch's optimizers could use. One whose bytes are the parameter's is copied
    by the engine, or stays if it lies in its place in the engine's memory already. Any other is converted by torch.
    One that lies in the engine's memory at another place is copied aside first, because that place may be written
    before it is read.

    Args:
        core: the engine.
        params: the model's parameters in the engine's order.
        names: their names in errors.
        workers: how many workers this rank drives.
        manner: one of MANNERS.
        micro_batches: their counts, by worker.
        overlapped: whether sums go to other teams during backward.

    Attributes:
        bound: the worker whose gradients `.grad` shows.
        present: for each worker and parameter, 1 if there is a gradient in the engine's memory.
    """

    def __init__(
        self,
        core: "_core.Engine",
        params: list[torch.Tensor],
        names: Sequence[str],
        workers: int,
        manner: str,
        micro_batches: MicroBatches,
        overlapped: bool,
    ) -> None:
        self._core = core
        self._params = params
        self._names = names
        self._pid = os.getpid()
        self.bound = 0
        self.present = np.zeros((workers, len(params)), dtype=np.uint8)
        self._sources = np.zeros((len(params), 2), dtype=np.int64)
        # The engine's memory as tensors. Users may replace the data of a tensor that they see as `.grad`, so they see
        # others.
        self._views = [
            Views(lambda i, v=v: core.gradients(v, i), len(params))  # type: ignore[misc]
            for v in range(workers)
        ]
        self._places = [views.tensors for views in self._views]
        self._shown = [[place.detach() for place in places] for places in self._places]
        self._own_looks = max(looks_at(shown) for shown in self._shown[0])
        self._memory = _range_of(core.gradients, workers, len(params))
        # The weights lie there, too.
        self._arena = range(
            min(_range_of(core.weights, workers, len(params)).start, self._memory.start), self._memory.stop
        )
        self._reader = reader_for(core, self._places, self._memory)
        self._odd: list[int] = []  # at the last collect()
        # Gradients of workers that are not bound, of another type than the parameter's: they go on being summed in it.
        self._wide: list[dict[int, torch.Tensor]] = [{} for _ in range(workers)]
        self._finished: tuple[torch.Tensor, int, torch.Tensor | None] | None = None
        self._rescaled = False
        self._watched, self._last = self._ends_of_trained()
        self._micro_batches = micro_batches
        self._threads: set[int] = set()  # that backward passes ran in since the last step
        self._moves_early = manner == "hook" or overlapped
        self._watch_all = Watch(core, self._places, micro_batches) if overlapped else None
        self._hooks: dict[int, Any] = {}
        remove_with(self, self._hooks)
        self._install_hooks(everywhere=self._moves_early)
        self.witnesses = Witnesses(params, workers, micro_batches)

    # -- Into the engine's memory --------------------------------------------------------------------------------

    def collect(self) -> None:
        """Bring the bound worker's gradients into its memory, in one batch.

        Raises:
            UsageError: if one cannot be a gradient of its parameter; nothing has been copied then.
        """
        shown = self._shown[self.bound]
        grads, self._odd, held = self._reader.read(self.bound, self._params, shown, self._sources)
        if held:  # one of them may be another parameter's gradient, whose address changes
            del grads
            for i in held:
                self._let_go(self.bound, i)
            grads, self._odd, _ = self._reader.read(self.bound, self._params, shown, self._sources)
        if self._odd:
            self._convert(grads, self._odd)
        self._core.gather(self.bound, self._sources, self.present[self.bound])

    def _let_go(self, v: int, i: int) -> None:
        """Give a tensor that was a gradient of worker v, and that somebody kept, memory of its own."""
        shown, place = self._shown[v], self._places[v][i]
        if shown[i].data_ptr() in self._memory:  # else a user has given it other data, and shares that
            shown[i].data = shown[i].detach().clone()
        shown[i] = place.detach()

    def _let_go_of_replaced(self, which: Sequence[int]) -> None:
        """The same for those of these parameters whose gradient is another tensor by now."""
        shown = self._shown[self.bound]
        for i in which:
            if self._params[i].grad is not shown[i] and is_held(shown, i):
                self._let_go(self.bound, i)

    def _let_go_of_others(self, which: Sequence[int]) -> None:
        """The same for the gradients of the workers that the model does not show, which are dropped."""
        for v, shown in enumerate(self._shown):
            for i in which if v != self.bound else ():
                if is_held(shown, i):
                    self._let_go(v, i)

    @torch.no_grad()
    def _convert(self, grads: list[Any], odd: Sequence[int]) -> None:
        """Bring these gradients there by torch's own copy."""
        for i in odd:
            require_usable(grads[i], self._params[i], self._names[i])
        inside = [i for i in odd if self._is_inside(grads[i])]
        values = {i: self._aside(i, grads[i]) for i in odd}  # all are read before any is written
        for i, value in values.items():
            place = self._places[self.bound][i]
            self._core.touch(self.bound, i)
            place.copy_(value)
            self._sources[i] = place.data_ptr(), place.nbytes
        if inside:
            self._mend_shown(self.bound)
        for i in inside:
            self._move_out(i, grads[i], values[i])

    def _is_inside(self, grad: torch.Tensor) -> bool:
        """Return true if the gradient lies in this rank's gradient memory."""
        return is_plain_class(grad) and grad.layout == torch.strided and grad.data_ptr() in self._memory

    def _aside(self, i: int, grad: torch.Tensor) -> torch.Tensor:
        """The values of a gradient, where copying others does not change them."""
        grad = grad.detach()
        if self._is_inside(grad):
            return grad.clone()
        if is_plain_class(grad):
            return grad
        return torch.empty_like(self._places[self.bound][i]).copy_(grad)

    def _move_out(self, i: int, grad: torch.Tensor, values: torch.Tensor) -> None:
        """Let `.grad` keep its values, which lay in memory that has been written since."""
        if grad.dtype == self._params[i].dtype:
            self._params[i].grad = self._shown[self.bound][i]
        else:
            grad.data = values

    # -- What the model shows ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Bring the bound worker's gradients into its memory, before the model shows another worker."""
        self.witnesses.check()
        self.collect()
        self._wide[self.bound] = {i: wide.detach().clone() for i in self._odd for wide in self._wide_grads(i)}
        self.witnesses.note(self.bound)
        self.was_rescaled()

    def enter(self) -> None:
        """The model shows another worker: give it that one's gradients."""
        self.point()
        self.witnesses.rebind(self.bound)
        self.watch_again()

    def point(self) -> None:
        """Let `.grad` be the bound worker's gradients, where it has one."""
        self._mend_shown(self.bound)
        self._give(self.bound)

    def _give(self, v: int, which: Sequence[int] | None = None) -> None:
        """Let `.grad` of these parameters, or of all, be worker v's gradients from now on."""
        wide, shown, present = self._wide[v], self._shown[v], self.present[v].tolist()
        for i in range(len(shown)) if which is None else which:
            param, grad, here = self._params[i], wide.get(i, shown[i]), present[i]
            if here and grad is shown[i]:
                self._core.touch(
                    v, i
                )  # autograd writes there, and the engine hears of it only if it is there then
            try:
                param.grad = grad if here else None
            except RuntimeError:  # its type was changed meanwhile
                param.grad = grad.to(param.grad_dtype)

    def renew(self) -> None:
        """Look at the engine's memory anew where the storage of a gradient was moved elsewhere."""
        for views in self._views:
            views.renew()

    def _mend_shown(self, v: int) -> bool:
        """Look at the engine's memory anew where a user has given a tensor of it other data; tell if so."""
        shown = self._shown[v]
        self._views[v].renew()
        strays = set(self._reader.strays(v, shown))
        strays.update(i for i, tensor in enumerate(shown) if tensor.requires_grad)
        for i in strays:
            shown[i] = self._places[v][i].detach()
        return bool(strays)

    def forget(self) -> None:
        """All workers of this rank have none."""
        self._let_go_of_others(range(len(self._params)))
        self._threads.clear()
        self.present[:] = 0
        self._wide = [{} for _ in self._wide]
        self.witnesses.forget()
        for param in self._params:
            param.grad = None

    def clear_some(self, which: Sequence[int], set_to_none: bool) -> bool:
        """Drop the gradients of these parameters, or make them zeros, with every worker; true if others are left."""
        if set_to_none:
            self._forget_some(which)
        else:
            self._zero_some(which)
        self.witnesses.forget_some(which)
        return self._any_left(set(range(len(self._params))).difference(which))

    def _any_left(self, others: set[int]) -> bool:
        """Return true if one of these has a gradient that is not all zeros, with any worker."""
        self.present[self.bound] = [param.grad is not None for param in self._params]
        for v, places in enumerate(self._places):
            for i in sorted(others):
                grad = self._params[i].grad if v == self.bound else self._wide[v].get(i, places[i])
                if self.present[v, i] and grad is not None and _is_something(grad):
                    return True
        return False

    def _forget_some(self, which: Sequence[int]) -> None:
        self._let_go_of_others(which)
        self.present[:, which] = 0
        for i in which:
            self._params[i].grad = None
            for wide in self._wide:
                wide.pop(i, None)

    @torch.no_grad()
    def _zero_some(self, which: Sequence[int]) -> None:
        """Zeros in shared memory; a gradient that somebody else holds is zeroed where it is."""
        v = self.bound
        self.renew()
        self._let_go_of_replaced(which)
        self.present[v, which] = [self._params[i].grad is not None for i in which]
        kept = [i for i in self._elsewhere(which) if self._stays(i)]
        for i in which:
            for here, places, wide in zip(self.present, self._places, self._wide, strict=True):
                wide.pop(i, None)
                if here[i]:
                    places[i].zero_()
        for i in kept:
            grad: Any = self._params[i].grad
            self._wide[v][i] = grad
            _apart_from_graph(grad).zero_()
        self._mend_shown(v)
        self._give(v, which)
        for i in kept:
            del self._wide[v][i]

    def _elsewhere(self, which: Sequence[int]) -> list[int]:
        """Those of these parameters whose gradient does not lie in its place in the engine's memory."""
        shown = self._shown[self.bound]
        strays = set(self._reader.strays(self.bound, shown))
        grads = [self._params[i].grad for i in which]
        looks = zip(which, grads, strict=True)
        return [i for i, grad in looks if grad is not None and (grad is not shown[i] or i in strays)]

    @torch.no_grad()
    def zero(self) -> None:
        """Make what gradients there are zeros in shared memory, where the next backward pass adds to them."""
        v = self.bound
        self._threads.clear()
        self.renew()
        self.witnesses.forget()
        self._let_go_of_replaced(range(len(self._params)))
        self.present[v] = [param.grad is not None for param in self._params]
        others = self._elsewhere(range(len(self._params)))
        kept = [i for i in others if self._stays(i)]
        self._wide[v] = {i: grad for i in kept if (grad := self._params[i].grad) is not None}
        workers = zip(self.present, self._places, strict=True)
        filled = [place for here, places in workers for place in compress(places, here)]
        if filled:
            torch._foreach_zero_(filled)
        for wide in self._wide:
            for grad in wide.values():
                _apart_from_graph(grad).zero_()
        if self._mend_shown(v) or others:
            self._give(v)
        self._wide[v] = {}

    def _stays(self, i: int) -> bool:
        """Return true if a gradient shall be zeroed where it is: one that is wider, or one that somebody else holds."""
        param = self._params[i]
        if self._wide_grads(i):
            return True
        if held_alone(param):
            return False
        grad: Any = param.grad
        if not is_plain_class(grad) or grad.layout != torch.strided or grad.data_ptr() in self._arena:
            return False
        like_it = grad.dtype == param.dtype and grad.shape == param.shape
        if not like_it or grad.is_neg() or grad.grad_fn is not None or grad.is_inference():
            return False
        return bool(grad.is_contiguous() or grad.stride() == param.stride())

    def _wide_grads(self, i: int) -> list[torch.Tensor]:
        """The parameter's gradient, if it is of another type, as the parameter's `grad_dtype` says."""
        param, grad = self._params[i], self._params[i].grad
        if grad is None or grad.dtype == param.dtype:
            return []
        return [grad] if getattr(param, "grad_dtype", param.dtype) in (None, grad.dtype) else []

    # -- What autograd tells -------------------------------------------------------------------------------------

    def _install_hooks(self, everywhere: bool) -> None:
        """On every parameter, or on the first and the last one that are trained."""
        mine = weakref.ref(self)
        for i, param in enumerate(self._params):
            if (
                param.requires_grad
                and i not in self._hooks
                and (everywhere or i in (self._watched, self._last))
            ):
                hook = _finisher(mine, i, everywhere)
                self._hooks[i] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _ends_of_trained(self) -> tuple[int, int]:
        """The numbers of the first and the last parameter that are trained, which tell of backward passes."""
        trained = [i for i, param in enumerate(self._params) if param.requires_grad] or [-1]
        return trained[0], trained[-1]

    def watch_trained(self) -> None:
        """Choose others that tell of backward passes where those were frozen."""
        if self._watched < 0 or not all(self._params[i].requires_grad for i in (self._watched, self._last)):
            self._watched, self._last = self._ends_of_trained()
            self._install_hooks(everywhere=False)

    def finish(self, i: int, param: torch.Tensor, copy: bool) -> None:
        """Autograd has accumulated into this parameter's gradient."""
        if param.grad is None or os.getpid() != self._pid:
            return  # a forked process has gradients of its own
        self._threads.add(threading.get_ident())
        if i in (self._watched, self._last):
            self._micro_batches.passed(self.bound, i)
        shown = self._shown[self.bound]
        if copy and param.grad is not shown[i] and len(self._threads) == 1 and self._moves(i, param):
            place = self._places[self.bound][i]
            if is_held(shown, i):
                self._let_go(self.bound, i)
            self._core.touch(self.bound, i)
            place.copy_(param.grad)
            param.grad = shown[i] = place.detach()
        if i == self._watched:
            self._watch(param.grad)
        if self._watch_all is not None and param.grad is shown[i]:
            self._watch_all.finish(self.bound, i)

    def _moves(self, i: int, param: torch.Tensor) -> bool:
        """Return true if autograd's own gradient can go to shared memory now, without a trace that anybody could see.

        A gradient of another type goes on being summed in that type. One that requires a gradient is a part of a graph.
        Where somebody else holds the gradient, writes on either side must be seen on the other.
        """
        if not held_alone(param):
            return False
        grad: Any = param.grad
        if (
            grad.requires_grad
            or grad.dtype != param.dtype
            or grad.shape != param.shape
            or self._is_inside(grad)
        ):
            return False
        return self._is_free(i)

    def _is_free(self, i: int) -> bool:
        """Return true if no other parameter's gradient lies in the place of this one."""
        if looks_at(self._shown[self.bound][i]) == self._own_looks:
            return True
        place = self._places[self.bound][i]
        here = range(place.data_ptr(), place.data_ptr() + place.nbytes)
        grads = [param.grad for param in self._params]
        return not any(
            self._is_inside(grad) and grad.data_ptr() in here for grad in grads if grad is not None
        )

    def report_changes(self) -> None:
        """Tell the engine what was written into gradients whose sums may be with other teams already."""
        if self._watch_all is not None:
            self._watch_all.report()

    def require_one_thread(self) -> None:
        """UsageError if gradients may have been moved in one thread while another one wrote them."""
        threads, self._threads = self._threads, set()
        if self._moves_early and len(threads) > 1:
            raise UsageError(
                f"since the last step, backward() ran in {len(threads)} threads, and gradients that move to shared "
                'memory as soon as they are there take one thread only: construct with gradients="copy" and without '
                "overlap"
            )

    def step_taken(self) -> None:
        """Note that the step was taken: later gradients belong to the next one."""
        self.witnesses.step_taken()
        if self._watch_all is not None:
            self._watch_all.forget()

    def marks(self) -> list[tuple[int, int]]:
        """The identities and versions of the bound worker's gradients, which a backward pass changes."""
        grads = [param.grad for param in self._params]
        return [(0, 0) if grad is None else (id(grad), version_of(grad)) for grad in grads]

    def end_micro_batch(self) -> None:
        """A micro-batch of the bound worker has come, and others follow."""
        self.witnesses.check()
        self.witnesses.note(self.bound)

    def _watch(self, grad: torch.Tensor | None) -> None:
        plain = grad is not None and not grad.is_inference()
        self._finished = (grad, grad._version, _sample(grad)) if grad is not None and plain else None

    def watch_again(self) -> None:
        """Take all writes into the gradients until now as intended."""
        if self._watched >= 0:
            self._watch(self._params[self._watched].grad)

    def forget_rescaling(self) -> None:
        """Later writes into the gradients are nobody's mistake."""
        self._finished = None
        self._rescaled = False

    def was_rescaled(self) -> bool:
        """Return true if somebody wrote into a gradient after autograd had finished it, and not just zeros."""
        if self._finished is not None:
            grad, version, before = self._finished
            self._rescaled |= grad._version != version and _is_other(before, _sample(grad))
        return self._rescaled

    def remove_hooks(self) -> None:
        """Leave the model without traces of these gradients."""
        remove_all(self._hooks)
        self.witnesses.remove()


def _range_of(views: Callable[[int, int], "_core.View"], workers: int, layers: int) -> range:
    """The addresses from the first worker's first layer to the end of the last worker's last."""
    last = views(workers - 1, layers - 1)
    bytes_of_last = look_at(last, "torch").nbytes
    return range(views(0, 0).address, last.address + bytes_of_last)


def _sample(grad: torch.Tensor) -> torch.Tensor | None:
    """A copy of a few elements. A device is not asked, because the host would wait for it."""
    if grad.device.type != "cpu" or not is_plain_class(grad) or grad.layout != torch.strided:
        return None
    if not grad.is_contiguous() or grad.numel() == 0 or not grad.untyped_storage().data_ptr():
        return None
    return grad.detach().view(-1)[:: -(-grad.numel() // SAMPLES)].clone()


def _is_other(before: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    """Return true if elements have become others than zero, or if that is not known."""
    if before is None or now is None or before.shape != now.shape:
        return True
    return bool(((before != now) & (now != 0)).any())


def _is_something(grad: torch.Tensor) -> bool:
    if grad.device.type != "cpu" or grad.layout != torch.strided:
        return True
    return bool(grad.detach().any())


def _apart_from_graph(grad: torch.Tensor) -> torch.Tensor:
    """The gradient itself, after what torch's own zero_grad() does to one of a graph."""
    return grad.detach_() if grad.grad_fn is not None else grad.requires_grad_(False)


def _finisher(gradients: "weakref.ref[Gradients]", i: int, copy: bool) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter; it does not keep the gradients alive."""

    def finish(param: torch.Tensor) -> None:
        mine = gradients()
        if mine is not None:
            mine.finish(i, param, copy)

    return unserializable_hook(finish)  # type: ignore[no-any-return, no-untyped-call]
