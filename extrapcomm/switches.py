"""Switches that torch's optimizers have and the rules here do not."""

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UsageError

__all__ = ["refuse_switches", "without_inert"]

# Each with the remedy that its refusal names. A rule may have one of them as a flag of its own.
REFUSED = {
    "amsgrad": "Adam, AdamW and ExtrapAdam have it",
    "capturable": "leave it out, as any step can be captured: see prepare_replay()",
    "differentiable": "leave it out, as no step is part of an autograd graph",
}

# Switches that a saved group may have and that say nothing about the arithmetic.
INERT = ("capturable",)


def refuse_switches(group: Mapping[str, Any], rule: str, flags: Sequence[str]) -> None:
    """Complain if a group of parameters asks for a switch that its rule does not have.

    Args:
        group: the group of parameters.
        rule: the name of the rule.
        flags: the flags that the rule has.

    Raises:
        UsageError: naming the switch and what to do instead.
    """
    for name, remedy in REFUSED.items():
        if group.get(name) and name not in flags:
            raise UsageError(f"extrapcomm's rule {rule!r} does not have {name}: {remedy}")


def without_inert(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group without the switches that have no meaning here."""
    return {name: value for name, value in saved.items() if name not in INERT}
