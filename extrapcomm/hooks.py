"""How a torch model learns of the master weights: hooks on saving and loading, and its buffers."""

import weakref
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .errors import UsageError
from .model_methods import forward_methods
from .modes import outside_inference
from .ownership import bytes_of
from .world import World

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["attach", "sync_buffers"]


def attach(optimizer: "BoundOptimizer", model: torch.nn.Module) -> None:
    """Hook every module of the model, also for parameters that the optimizer takes in later.

    The hooks do not keep the optimizer alive, and do nothing once it is closed: then the model holds w anyway.
    """
    if not any(id(param) in optimizer._binding.index for param in model.parameters()):
        raise UsageError("the model holds none of this optimizer's parameters")
    for module in model.modules():
        module._register_state_dict_hook(Saving(optimizer))  # type: ignore[no-untyped-call]
        module._register_load_state_dict_pre_hook(BeforeLoading(optimizer), with_module=True)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(AfterLoading(optimizer))  # type: ignore[no-untyped-call]
    forward_methods(optimizer, model)
    optimizer._attached.add(model)
    optimizer._declare_names()


class Hook:
    """On a module, for an optimizer that it does not keep alive. Copies and pickles of it do nothing.

    Those are what Python itself has that does nothing, so that a model can be unpickled without this library.
    """

    def __init__(self, optimizer: "BoundOptimizer") -> None:
        self._reference = weakref.ref(optimizer)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")

    def optimizer_of(self, module: torch.nn.Module) -> "BoundOptimizer | None":
        """The optimizer, if it is in use and trains a parameter of this very module that no other one has taken."""
        optimizer = self._reference()
        if optimizer is None or optimizer._closed or optimizer._showing:
            return None
        index, ownership = optimizer._binding.index, optimizer._binding.ownership
        params = [p for p in module._parameters.values() if p is not None and id(p) in index]
        return optimizer if any(not ownership.is_taken(p) for p in params) else None


class Saving(Hook):
    """Puts the master weights into a state_dict, unless that holds the Parameters themselves (`keep_vars=True`)."""

    @outside_inference
    def __call__(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """As torch calls it."""
        optimizer = self._reference()
        if optimizer is None or optimizer._closed or optimizer._showing or optimizer._to_adopt:
            return
        index, ownership = optimizer._binding.index, optimizer._binding.ownership
        # Parameters of submodules, too: some may have been added, or wrapped, since the hooks were installed.
        for name, param in module.named_parameters(remove_duplicate=False):
            if id(param) not in index or state.get(key := prefix + name, param) is param:
                continue
            if ownership.is_taken(param):
                continue
            i, handed_out = index[id(param)], optimizer._handed_out
            if (tensor := handed_out.in_dict(i, state)) is None:  # not tied to one that is there already
                tensor = optimizer.master(i).to(param.dtype)
                handed_out.add(i, tensor, key)
            state[key] = tensor
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = tree_map_only(torch.Tensor, partial(_apart, optimizer, key), state[key])


def _apart(optimizer: "BoundOptimizer", key: str, value: torch.Tensor) -> torch.Tensor:
    """Another look at a parameter, which a module saves under a name of its own: the same look at a copy of w."""
    if id(value) in optimizer._binding.index or value.layout != torch.strided:
        return value
    i = optimizer._binding.ownership.parameter_at(value.data_ptr())
    if i is None or optimizer._binding.ownership.is_taken(param := optimizer._binding.params[i]):
        return value
    storage = optimizer.master(i).to(param.dtype).untyped_storage()
    offset = (value.data_ptr() - param.data_ptr()) // value.element_size()
    look = torch.empty(0, dtype=value.dtype, device="cpu")
    look.set_(storage, offset, value.shape, value.stride())
    optimizer._handed_out.add(i, look, key)
    return look


class BeforeLoading(Hook):
    """Lets the model hold the master weights, so that what is not loaded is adopted undisplaced."""

    def __call__(self, module: torch.nn.Module, *_: Any) -> None:
        """As torch calls it."""
        if (optimizer := self.optimizer_of(module)) is not None:
            if torch.__future__.get_swap_module_params_on_conversion():
                raise UsageError(
                    "load_state_dict() would exchange the parameters for other tensors, because "
                    "torch.__future__.set_swap_module_params_on_conversion(True) was called: set it to False first"
                )
            optimizer._begin_loading()


class AfterLoading(Hook):
    """Has the next step adopt what was loaded."""

    def __call__(self, module: torch.nn.Module, _: Any) -> None:
        """As torch calls it."""
        if (optimizer := self.optimizer_of(module)) is not None:
            optimizer._to_adopt = True
            optimizer._handed_out.forget()


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
