"""How a torch model learns of the master weights: hooks on saving and loading, and its buffers."""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import UsageError
from .world import World

if TYPE_CHECKING:
    from .fused import FusedOptimizer

__all__ = ["attach", "sync_buffers"]


def attach(optimizer: "FusedOptimizer", model: torch.nn.Module, index: Mapping[int, int]) -> None:
    """Hook every module that holds a parameter of the optimizer; `index` finds parameters by identity.

    The hooks do not keep the optimizer alive, and do nothing once it is closed: then the model holds w anyway.
    """
    reference = weakref.ref(optimizer)
    holders = [m for m in model.modules() if any(id(p) in index for p in m._parameters.values())]
    if not holders:
        raise UsageError("the model holds none of this optimizer's parameters")
    for module in holders:
        module._register_state_dict_hook(_saving(reference, index))  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_loading(reference))  # type: ignore[no-untyped-call]


def _saving(reference: Any, index: Mapping[int, int]) -> Any:
    def put_master_weights(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        optimizer = reference()
        if optimizer is None or optimizer._closed or optimizer._showing or optimizer._to_adopt:
            return
        for name, param in module._parameters.items():
            if param is not None and id(param) in index and prefix + name in state:
                state[prefix + name] = optimizer.master(index[id(param)]).to(param.dtype)

    return put_master_weights


def _loading(reference: Any) -> Any:
    def mark(module: torch.nn.Module, _: Any) -> None:
        optimizer = reference()
        if optimizer is None or optimizer._closed or optimizer._showing:
            return
        if optimizer._binding.bound != 0:
            raise UsageError(
                "load_state_dict() inside worker(): leave the context first; rank 0's first worker loads"
            )
        optimizer._to_adopt = True

    return mark


def sync_buffers(world: World, model: torch.nn.Module, how: str) -> None:
    """Collective: one broadcast, or one sum, per buffer."""
    error = (
        None
        if how in ("broadcast", "average")
        else UsageError(f"how must be 'broadcast' or 'average', not {how!r}")
    )
    buffers = list(model.buffers())
    world.agree(error, f"sync_buffers of {len(buffers)} buffers, {sum(b.nbytes for b in buffers)} bytes")
    for buffer in buffers:
        if how == "average" and buffer.is_floating_point():
            _average(world, buffer)
        else:
            _broadcast(world, buffer)


def _average(world: World, buffer: torch.Tensor) -> None:
    mine = buffer.detach().to(torch.float64).contiguous().numpy()
    total = np.empty_like(mine)
    world.comm.Allreduce(mine, total)
    buffer.copy_(torch.from_numpy(total).div_(world.size))


def _broadcast(world: World, buffer: torch.Tensor) -> None:
    """As bytes: NumPy does not know every type that torch does."""
    values = buffer.detach().contiguous()
    world.comm.Bcast(values.flatten().view(torch.uint8).numpy(), root=0)
    buffer.copy_(values)
