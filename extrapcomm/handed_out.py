"""Copies of master weights that state_dicts have handed out, and must not be taken for the weights themselves."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from .errors import UsageError

__all__ = ["HandedOut"]


class HandedOut:
    """The tensors that `model.state_dict()` has given away and that somebody still holds.

    In torch such a tensor is the parameter itself, so writing into it changes the model. Here it is a copy of the
    master weights, so a write would be lost: the next step refuses it. Tensors that nobody holds are forgotten.
    """

    def __init__(self) -> None:
        self._entries: dict[
            int, tuple[weakref.ref[torch.Tensor], int, str]
        ] = {}  # the newest of each parameter
        self._older: list[tuple[weakref.ref[torch.Tensor], int, str]] = []

    def add(self, i: int, tensor: torch.Tensor, name: str) -> None:
        """This tensor stands for parameter i in a state_dict, under this name."""
        if i in self._entries and self._entries[i][0]() is not None:
            self._older.append(self._entries[i])
        self._entries[i] = (weakref.ref(tensor), tensor._version, name)

    def in_dict(self, i: int, state: Mapping[str, Any]) -> torch.Tensor | None:
        """The tensor that stands for parameter i in this very dict, under another name; None if there is none."""
        if i not in self._entries:
            return None
        reference, _, name = self._entries[i]
        tensor = reference()
        return tensor if tensor is not None and state.get(name) is tensor else None

    def forget(self) -> None:
        """The weights were taken anew, so no earlier write can be lost."""
        self._entries.clear()
        self._older.clear()

    def require_unwritten(self) -> None:
        """Complain if somebody wrote into a tensor that is still there."""
        if not self._entries:
            return
        for reference, version, name in [*self._older, *self._entries.values()]:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                raise UsageError(
                    f"the tensor {name!r} from model.state_dict() was written. It is a copy of the master weights, so "
                    "the model does not have what was written: change weights inside opt.master_weights(write=True), "
                    "or load the dict with model.load_state_dict(); clone the tensors if the copies are meant"
                )
        self._older = [entry for entry in self._older if entry[0]() is not None]
        self._entries = {i: entry for i, entry in self._entries.items() if entry[0]() is not None}
