"""The engine's weights and state as torch.optim's dictionaries, and back."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from . import _core
from .errors import UsageError
from .hyper import Rule

__all__ = ["FOREIGN_SWITCHES", "fill", "groups_of", "layers_of", "restore", "snapshot", "strided"]

Layer = tuple[NDArray[Any] | None, list[NDArray[Any] | None], int]

# Switches of torch's rules that change the arithmetic and have no counterpart here.
FOREIGN_SWITCHES = ("maximize", "amsgrad", "differentiable")


def strided(flat: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """An array in the order of memory as a tensor of the parameter's shape and strides."""
    return torch.from_numpy(flat).as_strided(like.shape, like.stride())


def fill(
    packed: dict[str, Any], core: "_core.Engine", rule: Rule, params: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Put weights and state into the dictionary that torch made of the groups."""
    for group in packed["param_groups"]:
        if callable(group["inner_lr"]):
            del group["inner_lr"]
    packed["state"] = {i: _state_of(core, rule, i, param) for i, param in enumerate(params)}
    return packed


def _state_of(core: "_core.Engine", rule: Rule, i: int, param: torch.Tensor) -> dict[str, Any]:
    state = {"master": strided(core.read(i, 0), param)}
    if core.updates(i):
        state["step"] = torch.tensor(float(core.updates(i)))
        for slot, name in enumerate(rule.slots[: core.slots], 1):
            state[name] = strided(core.read(i, slot), param)
    return state


def groups_of(state_dict: Mapping[str, Any], current: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups, completed by the present values of what they do not have."""
    try:
        saved = list(state_dict["param_groups"])
        sizes = [len(group["params"]) for group in saved]
    except (KeyError, TypeError):
        raise UsageError("this is not an optimizer's state_dict: it has no param_groups") from None
    if sizes != [len(group["params"]) for group in current]:
        raise UsageError(
            f"the state_dict has groups of {sizes} parameters, the optimizer of "
            f"{[len(group['params']) for group in current]}"
        )
    if switches := [s for s in FOREIGN_SWITCHES if any(group.get(s) for group in saved)]:
        raise UsageError(f"the state_dict uses {', '.join(switches)}, which extrapcomm does not have")
    return [{**now, **then} for now, then in zip(current, saved, strict=True)]


def layers_of(
    state_dict: Mapping[str, Any], core: "_core.Engine", rule: Rule, params: Sequence[torch.Tensor]
) -> tuple[list[Layer], int]:
    """What the engine loads, and a digest of it that must be alike on all ranks."""
    state = state_dict.get("state", {})
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    layers = [_layer(state.get(i, {}), core, rule, p) for i, p in zip(order, params, strict=True)]
    digest = hashlib.blake2b(digest_size=8)
    for weights, slots, updates in layers:
        digest.update(str(updates).encode())
        for array in (weights, *slots):
            digest.update(b"-" if array is None else array.data)
    return layers, int.from_bytes(digest.digest(), "little")


def _layer(entry: Mapping[str, Any], core: "_core.Engine", rule: Rule, param: torch.Tensor) -> Layer:
    slots = [_flat(entry.get(name), param) for name in rule.slots[: core.slots]]
    counted = int(entry["step"]) if "step" in entry else int(any(slot is not None for slot in slots))
    return _flat(entry.get("master"), param), slots, counted


def _flat(value: Any, param: torch.Tensor) -> NDArray[Any] | None:
    """A saved tensor in the master type and in the order of the parameter's memory."""
    if value is None:
        return None
    if tuple(value.shape) != tuple(param.shape):
        raise UsageError(
            f"the state_dict has a tensor of shape {tuple(value.shape)} for one of {tuple(param.shape)}"
        )
    master = torch.float64 if param.dtype == torch.float64 else torch.float32
    flat = torch.empty(param.numel(), dtype=master)
    flat.as_strided(param.shape, param.stride()).copy_(value)
    return flat.numpy()


def snapshot(core: "_core.Engine", count: int) -> list[Layer]:
    """Weights and state of an engine's first layers."""
    slots = range(1, core.slots + 1)
    return [(core.read(i, 0), [core.read(i, s) for s in slots], core.updates(i)) for i in range(count)]


def restore(core: "_core.Engine", saved: list[Layer], count: int) -> None:
    """Collective: give a snapshot to an engine of `count` layers; those that it does not have start afresh."""
    empty: list[NDArray[Any] | None] = [None] * core.slots
    layers: list[Layer] = [(weights, (slots + empty)[: core.slots], n) for weights, slots, n in saved]
    layers += [(None, list(empty), 0)] * (count - len(saved))
    core.load(layers, 0)
