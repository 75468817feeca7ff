"""The model's weights in the workers' shared memory: which worker they show, and whether others wrote them."""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch.autograd import graph
from torch.nn.utils import parametrize

from . import _core
from .arrays import form_of, look_at
from .errors import UsageError
from .modes import outside_inference
from .odd_gradients import PLAIN_CLASSES

__all__ = ["Ownership", "Views", "bump_versions", "bytes_of", "forget_derived", "strided"]


NOBODYS = -(2**62)  # a version that no tensor has, however many writes are counted


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


@outside_inference
def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's elements, as bytes. A view would need strides that a tensor of one element may not have."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    return flat.copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def forget_derived() -> None:
    """Drop what torch has computed from weights and keeps by the tensor, although its memory has others now."""
    torch.clear_autocast_cache()
    getattr(parametrize, "_cache", {}).clear()  # of parametrize.cached()


class Views:
    """Tensors that view one worker's arrays in an engine's memory.

    `share_memory_()` and multiprocessing move a storage to other memory, and every tensor on that storage with it. The
    engine's memory stays where it is, so such a view must be made anew.

    Args:
        view: returns the memory of the i-th parameter.
        count: the number of parameters.

    Attributes:
        tensors: one for each parameter.
        addresses: where each of them begins.
    """

    def __init__(self, view: Callable[[int], "_core.View"], count: int) -> None:
        self._view = view
        self.tensors: list[torch.Tensor] = [look_at(view(i), "torch") for i in range(count)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        looks = enumerate(zip(self.addresses, self.tensors, strict=True))
        self._spans = sorted((at, at + tensor.nbytes, i) for i, (at, tensor) in looks if tensor.nbytes > 0)

    def moved(self, i: int) -> bool:
        """Return true if a view's storage no longer lies in the engine's memory."""
        return self.tensors[i].data_ptr() != self.addresses[i]

    def at(self, address: int) -> int | None:
        """Return the one in whose memory this address is."""
        k = bisect_right(self._spans, address, key=lambda span: span[0]) - 1
        return self._spans[k][2] if k >= 0 and address < self._spans[k][1] else None

    def renew(self) -> None:
        """Make new views where a storage was moved."""
        for i in range(len(self.tensors)):
            if self.moved(i):
                self.tensors[i] = look_at(self._view(i), "torch")


class Ownership:
    """Parameters that show the weights of one of this rank's workers, and were written by the engine last.

    Args:
        core: the engine.
        params: the model's parameters in the engine's order.
        names: the names that errors use.
        workers: the number of workers of this rank.

    Attributes:
        bound: the worker that the parameters show.
        holds_master: whether the parameters were given the master weights, to load into, and nothing was published
            since.
    """

    def __init__(
        self, core: "_core.Engine", params: list[torch.Tensor], names: list[str], workers: int
    ) -> None:
        self.core = core
        self.params = params
        self.names = names
        # Their shapes, strides and types as the engine has them, whatever others do to the parameters.
        self.forms = [
            torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta")
            for param in params
        ]
        self.bound = 0
        self._before_load: list[int] = []  # the versions when the model began to load something
        self._before_loading: frozenset[int] = frozenset()  # what others had written then,
        self._in_other_workers: dict[int, int] = {}  # also into weights of these workers
        self._versions: list[int] = []
        self._views = [
            Views(lambda i, v=v: core.weights(v, i), len(params))  # type: ignore[misc]
            for v in range(workers)
        ]
        # Absent with a torch without DLPack's table; then every parameter is looked at one by one.
        self._reader = core.gradient_reader(PLAIN_CLASSES)
        self._noticed: tuple[int, int] | None = (
            None  # a parameter that was written, and the worker that was left
        )
        self._index = {id(param): i for i, param in enumerate(params)}
        self._impls = [param._cdata for param in params]
        self._counts_singly: bool | None = (
            None  # each step counts as one write; else parameters share a counter
        )
        self.record()
        _all.add(self)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The bound worker's weights in the engine's memory."""
        return self._views[self.bound].tensors

    # -- Which worker the model shows ----------------------------------------------------------------------------

    def show(self, v: int) -> None:
        """Let the model have worker v's weights."""
        self.bound = v
        for param, weights in zip(self.params, self.weights, strict=True):
            param.data = weights
        self.record()
        forget_derived()

    def show_again(self) -> None:
        """Let the model have the bound worker's weights where it had others, and forget what was written."""
        self._noticed = None
        self._views[self.bound].renew()
        self.show(self.bound)

    def copy_shown_to(self, v: int) -> None:
        """Give worker v's weights the values that the first worker's have."""
        torch._foreach_copy_(self._views[v].tensors, self._views[0].tensors)

    def is_taken(self, param: torch.Tensor) -> bool:
        """Return true if another optimizer has given the parameter its own memory since."""
        others = (other for other in _all if other is not self and id(param) in other._index)
        return any(param.is_set_to(other.weights[other._index[id(param)]]) for other in others)

    def require_not_taken(self) -> None:
        """UsageError if another optimizer has taken a parameter, naming it."""
        taken = next((i for i, param in enumerate(self.params) if self.is_taken(param)), None)
        if taken is not None:
            raise UsageError(self._describe(taken, self.bound))

    def held(self) -> list[int]:
        """Return the parameters that still have the bound worker's storage: no other optimizer has taken them."""
        pairs = zip(self.params, self.weights, strict=True)
        return [i for i, (param, mine) in enumerate(pairs) if param.is_set_to(mine)]

    def show_first_of(self, held: Sequence[int]) -> None:
        """Let these parameters have the first worker's weights."""
        self.bound = 0
        for i in held:
            self.params[i].data = self.weights[i]

    def end(self, held: Sequence[int]) -> None:
        """Bring the engine's last weights to these parameters where their storage was moved; mark all as written."""
        for i in held:
            if self._views[0].moved(i):
                self.params[i].data.copy_(look_at(self.core.weights(0, i), "torch"))
        bump_versions([self.params[i] for i in held])

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def record(self) -> None:
        """Remember the parameters' versions and addresses, to notice what others write into them."""
        self._take_versions()
        self._addresses = [param.data_ptr() for param in self.params]

    def mark_filled(self, written: Sequence[int]) -> None:
        """The model has been given the master weights but for these parameters, of which others have written."""
        self.mark_written()
        self._before_load = list(self._versions)
        for i in written:
            self._versions[i] = NOBODYS
        self.holds_master = True

    def loading_begins(self) -> list[int]:
        """Remember what others have written, before the model loads something; return what the model shows of that."""
        written = self.written()
        self._in_other_workers = {i: v for v in range(len(self._views)) if v for i in self._written_in(v)}
        if self._noticed is not None and self._noticed[1]:
            self._in_other_workers |= dict([self._noticed])
        self._before_load = [param._version for param in self.params]
        self._before_loading = frozenset(written)
        return written

    def _written_in(self, v: int) -> Iterator[int]:
        i = self.core.written(v)
        while i is not None:
            yield i
            i = self.core.written(v, i + 1)

    def was_loaded(self, i: int) -> bool:
        """Return true if the parameter was written since a load began."""
        return bool(self._before_load) and self.params[i]._version != self._before_load[i]

    def written_before_loading(self) -> frozenset[int]:
        """Return the parameters that others had written before the model loaded something else.

        Raises:
            UsageError: if that was done to the weights of a worker that is not bound, which nobody adopts.
        """
        for i, v in self._in_other_workers.items():
            if not self.was_loaded(i):
                raise UsageError(self._describe(i, v))
        return frozenset(i for i in self._before_loading if not self.was_loaded(i))

    def _take_versions(self) -> None:
        self.holds_master = False
        self._versions = [param._version for param in self.params]
        self._writes = 0  # of the engine since

    def mark_written(self) -> None:
        """Tell autograd that the weights have changed, so that backward through an old graph raises."""
        loaded = [self.was_loaded(i) for i in range(len(self._before_load))]
        bump_versions(self.params)
        self._take_versions()
        self._before_load = [
            NOBODYS if was else now for was, now in zip(loaded, self._versions, strict=False)
        ]

    def mark_stepped(self) -> None:
        """The same after a step, before which nobody else had written."""
        bump_versions(self.params)
        self.holds_master = False
        self._writes += 1
        if self._counts_singly is None:
            self._counts_singly = [param._version for param in self.params] == self._expected()
        if not self._counts_singly:
            self._take_versions()

    def _expected(self) -> list[int]:
        return [version + self._writes for version in self._versions]

    def adopted(self) -> None:
        """Take the parameters as they are for the engine's own."""
        self._noticed = None
        self._before_load, self._before_loading, self._in_other_workers = [], frozenset(), {}
        self.mark_written()
        self.record()

    def written(self) -> list[int]:
        """Return the parameters that others were seen to write or to replace, of the bound worker."""
        return [i for i in range(len(self.params)) if self.is_written(i)]

    def is_written(self, i: int) -> bool:
        """Return true if somebody else was seen to write or to replace parameter i, of the bound worker."""
        param = self.params[i]
        replaced = param.data_ptr() != self._addresses[i] or _form(param) != _form(self.weights[i])
        return replaced or self.has_writes(i) or self.may_be_as_before(i)

    def has_writes(self, i: int) -> bool:
        """The same, but true for writes only: a storage that was moved has the values from before."""
        if self._samples_differ(i):
            return True
        return self._was_counted(i) and not self.core.displaced(i) and not self._shows_master(i)

    def may_be_as_before(self, i: int) -> bool:
        """Return true for writes after which a displaced parameter may have the bits from before, or others."""
        return self._was_counted(i) and not self._samples_differ(i) and self.core.displaced(i)

    def _was_counted(self, i: int) -> bool:
        return self.params[i]._version != self._versions[i] + self._writes

    def _samples_differ(self, i: int) -> bool:
        return self.core.written(self.bound, i, i + 1) is not None

    def is_own(self) -> bool:
        """Return true if nobody else was seen to write or replace a parameter."""
        return self._found([self.bound]) is None

    def require_own(self, everywhere: bool = False) -> None:
        """Complain if somebody else wrote or replaced a parameter.

        Args:
            everywhere: look at the weights of all workers of this rank, not only at the bound one's.

        Raises:
            UsageError: if so; it names the parameter.
        """
        if (found := self._found(range(len(self._views)) if everywhere else [self.bound])) is not None:
            raise UsageError(self._describe(*found))

    def notice(self) -> None:
        """Keep what others wrote for the bound worker, which the model leaves now, for the next require_own()."""
        self._noticed = self._found([self.bound])

    def _found(self, workers: Sequence[int]) -> tuple[int, int] | None:
        """Return a parameter that others wrote or replaced, and the worker."""
        if self._noticed is not None:
            return self._noticed
        if (changed := self._first_changed()) is not None:
            return changed, self.bound
        for v in workers:
            if (written := self.core.written(v)) is not None:
                return written, v
        return None

    def _describe(self, i: int, v: int) -> str:
        worker = f" of worker {v}" if v else ""
        return (
            f"parameter {self.names[i]!r}{worker} was written or replaced outside the optimizer, and the next step "
            "would lose that: call opt.adopt() after changing weights, change them in master_weights(write=True), or, "
            "to have other weights for a while only, do so inside opt.kept_weights()"
        )

    def _first_changed(self) -> int | None:
        """Return the first parameter that was replaced, or written and not restored to the engine's bits."""
        if self._reader and self._reader.unchanged(self.bound, self.params, self._versions, self._writes):
            return None
        if (turned := self._first_turned()) is not None:
            return turned
        versions = [param._version for param in self.params]
        looks = zip(self.params, versions, self._versions, self._addresses, strict=True)
        for i, (param, version, own, address) in enumerate(looks):
            written = version != own + self._writes
            if param.data_ptr() != address or (written and not self._has_master_bits(i)):
                return i
        self._take_versions()
        return None

    def _first_turned(self) -> int | None:
        """Return the first parameter that looks at its memory in another form, as after `p.data = p.data.t()`."""
        pairs = zip(self.params, self.weights, strict=True)
        return next((i for i, (param, mine) in enumerate(pairs) if _form(param) != _form(mine)), None)

    def _has_master_bits(self, i: int) -> bool:
        """Return true if the engine's last weights were w in the parameter's type, and it has those bits."""
        return not self.core.displaced(i) and self._shows_master(i)

    def require_master(self) -> None:
        """Complain if the model, which was given the master weights, does not hold them any more.

        Raises:
            UsageError: naming the parameter.
        """
        seen = self.core.written(self.bound)
        looks = zip(self.params, self._versions, self._addresses, strict=True)
        for i, (param, version, address) in enumerate(looks):
            own = param._version == version + self._writes and param.data_ptr() == address
            own = own and _form(param) == _form(self.weights[i])
            if (i == seen or not own) and not self._shows_master(i):
                raise UsageError(_lost(self.names[i]))

    def require_values(self, values: list[torch.Tensor]) -> None:
        """As require_master(), if the model was given these values."""
        for name, param, value in zip(self.names, self.params, values, strict=True):
            if param.shape != value.shape or not torch.equal(bytes_of(param), bytes_of(value)):
                raise UsageError(_lost(name))

    def _shows_master(self, i: int) -> bool:
        if _form(self.params[i]) != _form(self.weights[i]):
            return False
        master = strided(self.core.read(i, 0), self.forms[i]).to(self.params[i].dtype)
        return torch.equal(bytes_of(self.params[i]), bytes_of(master))

    @contextmanager
    def kept(self, which: Sequence[int] | None = None) -> Iterator[list[torch.Tensor]]:
        """Afterwards these parameters, or all, have the values from before, also after an exception: a copy of them."""
        kept = [self.params[i] for i in (range(len(self.params)) if which is None else which)]
        memory = [param.detach() for param in kept]
        values = [mine.clone() for mine in memory]
        try:
            yield values
        finally:
            for param, mine, value in zip(kept, memory, values, strict=True):
                if not _is_at(param, mine):
                    param.data = mine
                param.data.copy_(value)

    def parameter_at(self, address: int) -> int | None:
        """Return the parameter in whose memory, with the bound worker, this address is."""
        return self._views[self.bound].at(address)

    def is_in_place(self) -> bool:
        """Return true if every parameter is the bound worker's memory, in the engine's form."""
        views = self._views[self.bound]
        looks = zip(self.params, views.tensors, views.addresses, strict=True)
        return all(param.data_ptr() == at and _form(param) == _form(mine) for param, mine, at in looks)

    def copies(self) -> list[torch.Tensor]:
        """Return copies of the bound worker's weights."""
        return [weights.clone() for weights in self.weights]

    def restore(self, values: list[torch.Tensor]) -> None:
        """Give the bound worker's weights these values, and the model those weights."""
        self._views[self.bound].renew()
        torch._foreach_copy_(self.weights, values)
        self.show(self.bound)
        self.mark_written()

    def take_over(self) -> None:
        """Copy parameters that were replaced or moved by others into the bound worker's weights.

        Raises:
            UsageError: if one has another shape or type.
        """
        for views in self._views:
            views.renew()
        moved = [i for i, param in enumerate(self.params) if not _is_at(param, self.weights[i])]
        self._require_fitting(moved)
        values = [self.params[i].detach().clone() for i in moved]  # some may look at the memory of others
        for i, value in zip(moved, values, strict=True):
            self.weights[i].copy_(value)
            self.params[i].data = self.weights[i]

    def _require_fitting(self, which: Sequence[int]) -> None:
        """UsageError if one of these has another shape or type than the engine's."""
        for i in which:
            param, mine = self.params[i], self.weights[i]
            if param._cdata != self._impls[i]:
                raise UsageError(
                    f"parameter {self.names[i]!r} was exchanged for another tensor by torch.utils.swap_tensors, as a "
                    "module's conversion does after torch.__future__.set_swap_module_params_on_conversion(True): make "
                    "a new optimizer"
                )
            if (
                param.shape != mine.shape
                or form_of(param, self.names[i]).dtype != self.core.weights(0, i).dtype
            ):
                raise UsageError(f"parameter {self.names[i]!r} was replaced by one of another shape or type")


def _lost(name: str) -> str:
    return (
        f"parameter {name!r} was written or replaced inside master_weights(), which restores what was there before: "
        "take master_weights(write=True) to change the master weights, or kept_weights() for other weights that are "
        "not to stay"
    )


def _is_at(tensor: torch.Tensor, mine: torch.Tensor) -> bool:
    """Return true if both are the same look at the same memory."""
    return tensor.data_ptr() == mine.data_ptr() and _form(tensor) == _form(mine)


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


# All that are alive, to tell a parameter that a second optimizer has taken from one that was written.
_all: "weakref.WeakSet[Ownership]" = weakref.WeakSet()
