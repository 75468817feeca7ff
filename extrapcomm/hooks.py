"""How a torch model learns of the master weights: hooks on saving and loading, and its buffers."""

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import UsageError
from .model_methods import forward_methods
from .ownership import bytes_of
from .saved_copies import has_own_way, saves_itself, take_apart
from .world import World, log

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["attach", "attach_again", "computes_what_it_saves", "sync_buffers"]


def attach(optimizer: "BoundOptimizer", model: torch.nn.Module) -> None:
    """Hook every module of the model, also for parameters that the optimizer takes in later.

    The hooks do not keep the optimizer alive, and go when it is closed. Those of one that was dropped do nothing and go
    here: the garbage collector might drop it while torch goes through them.
    """
    if not any(id(param) in optimizer._binding.index for param in model.parameters()):
        raise UsageError("the model holds none of this optimizer's parameters")
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    _require_no_scripted_parameters(optimizer, model)
    for module in plain:
        _remove_dead(module)
        if not _is_hooked(optimizer, module):
            optimizer._handles += [
                module._register_state_dict_hook(Saving(optimizer)),  # type: ignore[no-untyped-call]
                module._register_load_state_dict_pre_hook(BeforeLoading(optimizer), with_module=True),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_post_hook(AfterLoading(optimizer)),  # type: ignore[no-untyped-call]
            ]
    forward_methods(optimizer, model)
    optimizer._attached.add(model)
    optimizer._declare_names()


def _require_no_scripted_parameters(optimizer: "BoundOptimizer", model: torch.nn.Module) -> None:
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    if any(id(param) in optimizer._binding.index for module in scripted for param in module.parameters()):
        raise UsageError("a scripted module takes no hooks: attach the model before torch.jit.script()")


def _is_hooked(optimizer: "BoundOptimizer", module: torch.nn.Module) -> bool:
    hooks = module._state_dict_hooks.values()
    return any(isinstance(hook, Saving) and hook.is_of(optimizer) for hook in hooks)


def _remove_dead(module: torch.nn.Module) -> None:
    """Remove the hooks of optimizers that were dropped."""
    before = module._load_state_dict_pre_hooks
    for hooks in (module._state_dict_hooks, before, module._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps those that take the module
            if isinstance(hook, Hook) and hook.is_dead:
                del hooks[key]


def attach_again(optimizer: "BoundOptimizer") -> None:
    """Hook what has been added to attached models since."""
    index = optimizer._binding.index
    for model in optimizer._attached.living():
        if any(id(param) in index for param in model.parameters()):
            try:
                attach(optimizer, model)
            except UsageError as error:  # the group is there already
                log.warning("%s", error)


def computes_what_it_saves(model: torch.nn.Module) -> bool:
    """Return true if a part of the model may save something else than its parameters and buffers as they are."""
    return saves_itself(model, _is_ours)


def _is_ours(hook: Any) -> bool:
    """Return true for a hook of this library, and for what a copy has in its place."""
    return isinstance(hook, Hook) or isinstance(getattr(hook, "__self__", None), nullcontext)


class Hook:
    """On a module, for an optimizer that it does not keep alive. Copies and pickles of it do nothing.

    Those are what Python itself has that does nothing, so that a model can be unpickled without this library.
    """

    def __init__(self, optimizer: "BoundOptimizer") -> None:
        self._reference = weakref.ref(optimizer)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")

    @property
    def is_dead(self) -> bool:
        """True if the optimizer is gone."""
        return self._reference() is None

    def is_of(self, optimizer: "BoundOptimizer") -> bool:
        """Return true for this optimizer's hooks."""
        return self._reference() is optimizer

    def optimizer_of(self, module: torch.nn.Module) -> "BoundOptimizer | None":
        """The optimizer, if it is in use and trains a parameter of this very module that no other one has taken."""
        optimizer = self._reference()
        return optimizer if optimizer is not None and not optimizer._showing and self.trains(module) else None

    def trains(self, module: torch.nn.Module) -> bool:
        """Return true if the optimizer is in use and trains a parameter of this very module that no other has taken."""
        optimizer = self._reference()
        if optimizer is None or optimizer._closed:
            return False
        index, ownership = optimizer._binding.index, optimizer._binding.ownership
        params = [p for p in module._parameters.values() if p is not None and id(p) in index]
        return any(not ownership.is_taken(p) for p in params)


class Saving(Hook):
    """Puts copies of the master weights into a state_dict, where the model's own `state_dict()` does not do so."""

    def __call__(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """As torch calls it."""
        optimizer = self._reference()
        if optimizer is None or optimizer._closed:
            return
        shown = optimizer._saving or optimizer._showing or optimizer._holds_what_is_saved
        if not shown and has_own_way(module, _is_ours):
            raise UsageError(
                f"{type(module).__name__} saves what it computes from its weights, and these are displaced: make the "
                "state_dict inside opt.master_weights()"
            )
        take_apart(optimizer, state, prefix, whole=False)


class BeforeLoading(Hook):
    """Lets the model hold the master weights, so that what is not loaded is adopted undisplaced."""

    def __call__(
        self, module: torch.nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *_: Any
    ) -> None:
        """As torch calls it."""
        if self.trains(module):
            if metadata.get("assign_to_params_buffers"):
                raise UsageError(
                    "load_state_dict(assign=True) would exchange the parameters for other tensors, which the optimizer "
                    "does not train: load without assign=True, or before the optimizer is made. A state_dict that was "
                    "loaded so once keeps a mark of it in its _metadata: load dict(state_dict)"
                )
            if torch.__future__.get_swap_module_params_on_conversion():
                raise UsageError(
                    "load_state_dict() would exchange the parameters for other tensors, because "
                    "torch.__future__.set_swap_module_params_on_conversion(True) was called: set it to False first"
                )
        if (optimizer := self.optimizer_of(module)) is not None:
            optimizer._begin_loading()


class AfterLoading(Hook):
    """Has the next step adopt what was loaded."""

    def __call__(self, module: torch.nn.Module, _: Any) -> None:
        """As torch calls it."""
        if (optimizer := self.optimizer_of(module)) is not None:
            optimizer._to_adopt = True
            index, ownership = optimizer._binding.index, optimizer._binding.ownership
            own = [index[id(p)] for p in module._parameters.values() if p is not None and id(p) in index]
            optimizer._handed_out.loaded([i for i in own if ownership.was_loaded(i)])


def sync_buffers(world: World, model: torch.nn.Module, how: str) -> None:
    """Collective: one broadcast, or one sum, per buffer."""
    error = (
        None
        if how in ("broadcast", "average")
        else UsageError(f"how must be 'broadcast' or 'average', not {how!r}")
    )
    buffers = list(model.buffers())
    world.agree(error, f"sync_buffers of {len(buffers)} buffers, {sum(b.nbytes for b in buffers)} bytes")
    if world.size == 1:
        return
    for buffer in buffers:
        if how == "average" and buffer.is_floating_point():
            _average(world, buffer)
        else:
            _broadcast(world, buffer)


def _average(world: World, buffer: torch.Tensor) -> None:
    mine = buffer.detach().to("cpu", torch.float64).contiguous().numpy()
    total = np.empty_like(mine)
    world.comm.Allreduce(mine, total)
    buffer.copy_(torch.from_numpy(total).div_(world.size))


def _broadcast(world: World, buffer: torch.Tensor) -> None:
    """As bytes: NumPy does not know every type that torch does."""
    sent = bytes_of(buffer)
    world.comm.Bcast(sent.numpy(), root=0)
    buffer.copy_(sent.view(buffer.dtype).view(buffer.shape))
