"""State_dicts of attached models: copies of the master weights where they would have looks at a worker's weights."""

import copy
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from .modes import outside_inference

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["saves_itself", "take_apart"]

MODULE = torch.nn.Module
OWN_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


def saves_itself(module: MODULE, is_ours: Any) -> bool:
    """Return true if a part of the model may save something else than its parameters and buffers as they are.

    Args:
        module: the model.
        is_ours: tells a hook of this library.
    """
    return any(_has_own_way(part, is_ours) for part in module.modules())


def _has_own_way(part: MODULE, is_ours: Any) -> bool:
    if any(getattr(type(part), name, None) is not getattr(MODULE, name) for name in OWN_METHODS):
        return True
    return bool(part._state_dict_pre_hooks) or not all(map(is_ours, part._state_dict_hooks.values()))


@outside_inference
def take_apart(
    optimizer: "BoundOptimizer", state: Any, prefix: str = "", keep_vars: bool | None = None
) -> None:
    """Replace in a state_dict what looks at the weights of the worker that the model shows.

    It gets a copy of the master weights, or of the weights that the next step adopts, in the same look. What is no
    tensor is copied as a whole while the model shows the master weights for saving only.

    Args:
        optimizer: whose parameters.
        state: the state_dict.
        prefix: of the entries.
        keep_vars: as the caller gave it, if that is known; then the Parameters themselves stay.
    """
    if optimizer._writing or optimizer._showing == "kept_weights" or not isinstance(state, MutableMapping):
        return
    for key in [key for key in state if str(key).startswith(prefix)]:
        apart = partial(_apart, optimizer, state, key, keep_vars)
        value = state[key]
        state[key] = (
            apart(value)
            if isinstance(value, torch.Tensor)
            else tree_map(partial(_leaf, optimizer, apart), value)
        )


def _leaf(optimizer: "BoundOptimizer", apart: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """What a state_dict has for a value that is no container which torch knows."""
    if isinstance(value, torch.Tensor):
        return apart(value)
    if not optimizer._shows_for_saving or isinstance(value, (str, bytes, int, float, type(None))):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # what it can be copied from is its owner's business
        return value


def _apart(
    optimizer: "BoundOptimizer",
    state: MutableMapping[str, Any],
    key: str,
    keep_vars: bool | None,
    value: torch.Tensor,
) -> torch.Tensor:
    """The same look at a copy."""
    index, ownership = optimizer._binding.index, optimizer._binding.ownership
    if value.layout != torch.strided or (id(value) in index and keep_vars is not False):
        return value
    i = ownership.parameter_at(value.data_ptr())
    if i is None or ownership.is_taken(param := optimizer._binding.params[i]):
        return value
    known = optimizer._handed_out.in_dict(i, state)  # tied to one that is there already
    if known is not None and _form(known) == _form(value) and value.data_ptr() == param.data_ptr():
        return known
    look = _look(_copy(optimizer, i), value, value.data_ptr() - param.data_ptr())
    optimizer._handed_out.add(i, look, key)
    return look


def _copy(optimizer: "BoundOptimizer", i: int) -> torch.Tensor:
    param = optimizer._binding.params[i]
    if optimizer._to_adopt or optimizer._showing:
        return param.detach().clone(memory_format=torch.preserve_format)
    return optimizer.master(i).to(param.dtype)


def _look(base: torch.Tensor, like: torch.Tensor, byte: int) -> torch.Tensor:
    look = torch.empty(0, dtype=like.dtype, device=base.device)
    return look.set_(base.untyped_storage(), byte // like.element_size(), like.shape, like.stride())


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()
