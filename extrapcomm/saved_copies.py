"""State_dicts of attached models: copies of the master weights where they would have looks at a worker's weights."""

import contextlib
import copy
import operator
import pickle
import warnings
from collections.abc import Callable, MutableMapping
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from .modes import outside_inference

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["has_own_way", "saves_itself", "take_apart"]

MODULE = torch.nn.Module
OWN_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")

Apart = Callable[[torch.Tensor], torch.Tensor]


def saves_itself(module: MODULE, is_ours: Callable[[Any], bool]) -> bool:
    """Return true if a part of the model may save something else than its parameters and buffers as they are.

    Args:
        module: the model.
        is_ours: tells a hook of this library.
    """
    return any(has_own_way(part, is_ours) for part in module.modules())


def has_own_way(part: MODULE, is_ours: Callable[[Any], bool]) -> bool:
    """The same for one module without its submodules."""
    if any(getattr(type(part), name, None) is not getattr(MODULE, name) for name in OWN_METHODS):
        return True
    replaced = (part.__dict__.get(name) for name in OWN_METHODS)
    if any(own is not None and not getattr(own, "is_plain", False) for own in replaced):
        return True
    return bool(part._state_dict_pre_hooks) or not all(map(is_ours, part._state_dict_hooks.values()))


@outside_inference
def take_apart(
    optimizer: "BoundOptimizer",
    state: Any,
    prefix: str = "",
    keep_vars: bool | None = None,
    whole: bool = True,
) -> Any:
    """Replace in a state_dict what looks at the weights of the worker that the model shows.

    It gets a copy of the master weights, or of the weights that the next step adopts, in the same look.

    Args:
        optimizer: whose parameters.
        state: the state_dict.
        prefix: of the entries.
        keep_vars: as the caller gave it, if that is known; then the Parameters themselves stay.
        whole: copy what torch does not know as a whole, while the model shows the master weights.

    Returns:
        The state_dict: the same object, if entries can be assigned to it.
    """
    if optimizer._writing or optimizer._showing == "kept_weights":
        return state
    opaque = whole and (optimizer._shows_for_saving or optimizer._showing == "master_weights")
    if not isinstance(state, MutableMapping):
        return _replaced(state, partial(_apart, optimizer, {}, "", keep_vars), opaque, set())
    for key in _with_prefix(state, prefix):
        apart = partial(_apart, optimizer, state, key, keep_vars)
        value = state[key]
        new = apart(value) if isinstance(value, torch.Tensor) else _replaced(value, apart, opaque, set())
        if new is not value:
            state[key] = new
    return state


def _with_prefix(state: MutableMapping[str, Any], prefix: str) -> list[str]:
    """The last entries of a state_dict that have the prefix: a module's own are the last when it has saved."""
    if not prefix or not hasattr(state, "__reversed__"):
        return [key for key in state if str(key).startswith(prefix)]
    return list(takewhile(lambda key: str(key).startswith(prefix), reversed(state)))


def _replaced(value: Any, apart: Apart, opaque: bool, seen: set[int]) -> Any:
    """A value whose tensors are apart from the weights: the same object, if none of them was a look at them."""
    if isinstance(value, torch.Tensor):
        return apart(value)
    if value is None or isinstance(value, (str, bytes, int, float)) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, MutableMapping):
        items = {key: _replaced(item, apart, opaque, seen) for key, item in value.items()}
        return _with_items(value, items)
    if isinstance(value, (list, tuple)):
        parts = [_replaced(item, apart, opaque, seen) for item in value]
        if all(map(operator.is_, parts, value)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return _copied(value) if opaque else value


def _with_items(mapping: MutableMapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A copy of a mapping, with its attributes, if the items differ."""
    changed = {key: item for key, item in items.items() if item is not mapping[key]}
    if not changed:
        return mapping
    other = copy.copy(mapping)
    for key, item in changed.items():
        other[key] = item
    return other


def _copied(value: Any) -> Any:
    """A copy of anything that can be copied or saved; what cannot be saved stays."""
    with contextlib.suppress(Exception):
        return copy.deepcopy(value)
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pickle.loads(pickle.dumps(value))
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
    if optimizer._to_adopt or optimizer._showing or optimizer._has_writes(i):
        return param.detach().clone(memory_format=torch.preserve_format)
    return optimizer.master(i).to(param.dtype)


def _look(base: torch.Tensor, like: torch.Tensor, byte: int) -> torch.Tensor:
    """The same look at another base; of a part, memory of its own, so that files have no more than that."""
    look = torch.empty(0, dtype=like.dtype, device=base.device)
    look = look.set_(base.untyped_storage(), byte // like.element_size(), like.shape, like.stride())
    if like.is_conj():
        look = look.conj()
    if like.is_neg():
        look = -look
    return look.clone() if look.nbytes < base.nbytes else look


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()
