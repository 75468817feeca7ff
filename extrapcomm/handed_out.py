"""Copies of master weights that state_dicts have handed out, and must not be taken for the weights themselves."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .errors import UsageError

__all__ = ["HandedOut"]


class Copy(NamedTuple):
    """A tensor that stands for a parameter under a name, and its version when it was known to have the right values."""

    reference: "weakref.ref[torch.Tensor]"
    version: int
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        return self.reference()

    @property
    def written(self) -> bool:
        tensor = self.tensor
        return tensor is not None and tensor._version != self.version

    def as_now(self) -> "Copy":
        tensor = self.tensor
        return self if tensor is None else self._replace(version=tensor._version)


class HandedOut:
    """The tensors that `model.state_dict()` has given away and that somebody still holds.

    In torch such a tensor is the parameter itself, so writing into it changes the model. Here it is a copy of the
    master weights, so a write would be lost: the next step refuses it. Tensors that nobody holds are forgotten.
    """

    def __init__(self) -> None:
        self._entries: dict[int, Copy] = {}  # the newest of each parameter
        self._older: dict[int, list[Copy]] = {}

    def add(self, i: int, tensor: torch.Tensor, name: str) -> None:
        """This tensor stands for parameter i in a state_dict, under this name."""
        if i in self._entries and self._entries[i].tensor is not None:
            self._older.setdefault(i, []).append(self._entries[i])
        self._entries[i] = Copy(weakref.ref(tensor), tensor._version, name)

    def in_dict(self, i: int, state: Mapping[str, Any]) -> torch.Tensor | None:
        """The tensor that stands for parameter i in this very dict, under another name; None if there is none."""
        if i not in self._entries:
            return None
        copy = self._entries[i]
        return copy.tensor if copy.tensor is not None and state.get(copy.name) is copy.tensor else None

    def forget(self) -> None:
        """The weights are what the model has, whatever was written elsewhere."""
        self._entries.clear()
        self._older.clear()

    def loaded(self, which: Iterable[int]) -> None:
        """The model has loaded these parameters, so what was written until now is not lost."""
        for i in which:
            if i in self._entries:
                self._entries[i] = self._entries[i].as_now()
            if i in self._older:
                self._older[i] = [copy.as_now() for copy in self._older[i]]

    def require_unwritten(self) -> None:
        """Complain if somebody wrote into a tensor that is still there."""
        if not (self._entries or self._older):
            return
        copies = [copy for older in self._older.values() for copy in older] + list(self._entries.values())
        written = next((copy.name for copy in copies if copy.written), None)
        if written is not None:
            raise UsageError(
                f"the tensor {written!r} from model.state_dict() was written. It is a copy of the master weights, so "
                "the model does not have what was written: change weights inside opt.master_weights(write=True), "
                "or load the dict with model.load_state_dict(); clone the tensors if the copies are meant"
            )
        alive = {i: [copy for copy in older if copy.tensor is not None] for i, older in self._older.items()}
        self._older = {i: older for i, older in alive.items() if older}
        self._entries = {i: copy for i, copy in self._entries.items() if copy.tensor is not None}
