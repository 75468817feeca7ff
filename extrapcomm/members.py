"""The parameters of the groups that an engine was built for, to notice param_groups that were edited by hand."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import UsageError

__all__ = ["Members"]

REMEDY = (
    "Restore it; add parameters with add_param_group(), freeze one with requires_grad_(False), and make a new "
    "optimizer for other changes"
)


class Members:
    """The members of all groups, by identity.

    Args:
        groups: the optimizer's groups.
        names: the parameters' names, over all groups in order.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        self._members: list[list[torch.Tensor]] = [list(group["params"]) for group in groups]
        self._names = list(names)

    def require_same(self, groups: Any) -> None:
        """Complain if a group, the list of groups, or a list of parameters is not what the engine was built for.

        Raises:
            UsageError: it names the first group that differs, what differs there, and the remedy.
        """
        if not self._are_same(groups):
            raise UsageError(f"{self._difference(groups)}, unlike when the optimizer was built. {REMEDY}")

    def _are_same(self, groups: Any) -> bool:
        """Return true if all groups have their members; this is all that a step does as a rule."""
        try:
            return len(groups) == len(self._members) and all(
                len(group["params"]) == len(members) and all(map(operator.is_, group["params"], members))
                for group, members in zip(groups, self._members, strict=True)
            )
        except (TypeError, KeyError):  # a generator has no length, a group may lack its parameters
            return False

    def _difference(self, groups: Any) -> str:
        if not isinstance(groups, list | tuple):
            return f"param_groups is a {type(groups).__name__}, not a list of dicts"
        for g, group in enumerate(groups[: len(self._members)]):
            if text := self._difference_in(g, group):
                return f"param_groups[{g}] {text}"
        if len(groups) < len(self._members):
            return f"param_groups[{len(groups)}] is missing: there are {len(groups)} of {len(self._members)} groups"
        return f"param_groups[{len(self._members)}] was added by hand"

    def _difference_in(self, g: int, group: Any) -> str | None:
        if not isinstance(group, dict) or "params" not in group:
            return "has no 'params'"
        params, members = group["params"], self._members[g]
        if not isinstance(params, list | tuple):
            return f"has a {type(params).__name__} instead of a list as 'params'"
        for i, (param, member) in enumerate(zip(params, members, strict=False)):
            if param is not member:
                return f"has {self._name_of(param)} as its parameter {i}"
        if len(params) == len(members):
            return None
        return f"has {len(params)} parameters instead of {len(members)}"

    def _name_of(self, tensor: Any) -> str:
        """Return the name of a tensor in the optimizer, with its group."""
        at = 0
        for g, members in enumerate(self._members):
            for member in members:
                if member is tensor:
                    return f"{self._names[at]!r} of group {g}"
                at += 1
        return "a tensor that is not trained"
