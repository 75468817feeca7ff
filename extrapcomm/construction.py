"""Construction of optimizers: an argument that is wrong on one rank is an error on every rank."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from .errors import ArgumentError
from .world import World

__all__ = ["Agreed", "refuse_unknown"]


class Agreed(type):
    """The class of optimizer classes whose constructor fails on every rank if it fails on one.

    A constructor compares its outcome with the other ranks' as soon as it has a world, and sets `_entered` before
    that. An exception raised earlier, such as Python's own for a missing argument, is brought to that comparison here.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make one; collective."""
        make: Any = cls.__new__
        made = make(cls, *args, **kwargs)
        if not isinstance(made, cls):
            return made
        try:
            made.__init__(*args, **kwargs)
        except Exception as error:
            if not hasattr(made, "_entered"):
                _raise_on_all(error, cls.__name__, kwargs.get("world"))
            raise
        return made


def _raise_on_all(error: Exception, name: str, world: Any) -> None:
    """Collective: the other ranks construct, so this one takes part in their agreement with its error."""
    if isinstance(error, TypeError):
        error = ArgumentError(str(error))
    given = isinstance(world, World)
    meeting = world if given else World()
    try:
        meeting.agree(error, name)
    finally:
        if not given:
            meeting.close()


def refuse_unknown(kind: type, unknown: Iterable[str]) -> None:
    """Complain about keywords that no constructor of this class takes.

    Raises:
        ArgumentError: naming the argument and, if there is one, the known argument most like it.
    """
    for name in unknown:
        known = _arguments(kind)
        near = get_close_matches(name, known, 1)
        help_ = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
        raise ArgumentError(f"{kind.__name__} has no argument {name!r}: {help_}")


def _arguments(kind: type) -> set[str]:
    """The names that constructors along the line of inheritance take."""
    names: set[str] = set()
    for each in kind.__mro__:
        if isinstance(each, Agreed) and "__init__" in vars(each):
            parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return names - {"self", "defaults", "choices"}
