"""Methods of an attached model that must reach its optimizers: `zero_grad()` and `state_dict()`."""

import copy
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from .errors import UsageError

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["forward_methods"]


class Method:
    """A method of one module, in place of its class's, which the optimizers of its parameters take part in.

    It keeps neither the module nor an optimizer alive. In a deep copy of the module, or in one that was unpickled, the
    method of the module's class is in its place; unpickling does not need this library. A shallow copy has the same
    object, so it acts on the module that was attached, whose parameters the copy shares.

    Args:
        module: whose method this is.
        replaced: what the user had put in place of the method of the module's class, or None.
    """

    NAME = ""

    def __init__(self, module: torch.nn.Module, replaced: Any = None) -> None:
        self._module = weakref.ref(module)
        self._replaced = replaced
        self._optimizers: list[weakref.ref[BoundOptimizer]] = []

    def add(self, optimizer: "BoundOptimizer") -> None:
        """Reach this optimizer, too."""
        if all(reference() is not optimizer for reference in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))

    def belongs_to(self, module: torch.nn.Module) -> bool:
        """Return true if this is the module's own, and not that of one of which it is a shallow copy."""
        return self._module() is module

    def _living(self) -> "list[BoundOptimizer]":
        optimizers = [reference() for reference in self._optimizers]
        return [one for one in optimizers if one is not None and not one._closed]

    def _attached(self) -> torch.nn.Module:
        if (module := self._module()) is None:
            raise UsageError(
                f"{self.NAME}() of a shallow copy of an attached model that is gone: call opt.attach(copy), or, "
                f"without an optimizer, delete its attribute {self.NAME!r}"
            )
        return module

    def _own(self, module: torch.nn.Module) -> Any:
        """What would be called without this library."""
        return getattr(type(module), self.NAME).__get__(module) if self._replaced is None else self._replaced

    def __reduce__(self) -> Any:
        if self._replaced is not None:
            return copy.copy, (self._replaced,)
        return getattr, (self._attached(), self.NAME)


class ZeroGrad(Method):
    """Lets the optimizers zero or drop the gradients of their parameters, too."""

    NAME = "zero_grad"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Zero or drop the gradients of all parameters of the module, with every worker.

        Args:
            args, kwargs: those of the module's own method, which is called with them. `set_to_none=False` among them,
                or as the first one, makes zeros of the optimizers' gradients; they are dropped otherwise.
        """
        module = self._attached()
        for optimizer in self._living():
            _zero(optimizer, module, bool(kwargs.get("set_to_none", args[0] if args else True)))
        self._own(module)(*args, **kwargs)


class StateDict(Method):
    """Lets the model hold the master weights meanwhile, for modules that save what they compute from their weights."""

    NAME = "state_dict"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own method."""
        module = self._attached()
        with ExitStack() as stack:
            for optimizer in self._living():
                stack.enter_context(optimizer._shown_for_saving())
            return self._own(module)(*args, **kwargs)


def forward_methods(optimizer: "BoundOptimizer", model: torch.nn.Module) -> None:
    """Let these methods of every module that holds parameters of the optimizer reach it."""
    index = optimizer._binding.index
    for module in model.modules():
        if not any(id(param) in index for param in module.parameters()):
            continue
        for kind in (ZeroGrad, StateDict):
            present = module.__dict__.get(kind.NAME)
            if not (isinstance(present, kind) and present.belongs_to(module)):
                present = module.__dict__[kind.NAME] = kind(module, _replaced(module, present, kind.NAME))
            present.add(optimizer)


def _replaced(module: torch.nn.Module, present: Any, name: str) -> Any:
    """What the user had put in place of a method; not what copying or unpickling has left there."""
    own = getattr(present, "__func__", None) is getattr(type(module), name)
    return None if own or isinstance(present, Method) else present


def _zero(optimizer: "BoundOptimizer", module: torch.nn.Module, set_to_none: bool) -> None:
    """A module with all parameters of the optimizer stands for it; another one for its own parameters only."""
    index = optimizer._binding.index
    which = sorted({index[id(param)] for param in module.parameters() if id(param) in index})
    if len(which) == len(index):
        optimizer.zero_grad(set_to_none)
    elif which:
        _zero_some(optimizer, which, set_to_none)


def _zero_some(optimizer: "BoundOptimizer", which: list[int], set_to_none: bool) -> None:
    """The same for some parameters; the micro-batches of the others go on counting."""
    binding = optimizer._binding
    binding.require_own_process()
    binding.gradients.forget_rescaling()
    if set_to_none:
        binding.gradients.forget_some(which)
    else:
        binding.gradients.zero_some(which)
