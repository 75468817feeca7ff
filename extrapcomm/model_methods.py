"""Methods of an attached model that must reach its optimizers: `zero_grad()` and `state_dict()`."""

import copy
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from .errors import UsageError
from .saved_copies import take_apart

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["forward_methods", "restore_methods"]


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

    def leave(self, module: torch.nn.Module) -> None:
        """Give the module its own method back, unless an optimizer is still there."""
        if self._living():
            return
        del module.__dict__[self.NAME]
        if self._replaced is not None:
            module.__dict__[self.NAME] = self._replaced

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
        """The method that would be called without this library."""
        return getattr(type(module), self.NAME).__get__(module) if self._replaced is None else self._replaced

    def __reduce__(self) -> Any:
        if self._replaced is not None:
            return copy.copy, (self._replaced,)
        return getattr, (self._attached(), self.NAME)


class ZeroGrad(Method):
    """Lets the optimizers zero or drop the gradients of their parameters, too."""

    NAME = "zero_grad"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Zero or drop the gradients of all parameters of the module, with every worker; within `worker(v)`, its own.

        Args:
            args, kwargs: those of the module's own method, which is called with them. `set_to_none=False` among them,
                or as the first one, makes zeros of the optimizers' gradients; they are dropped otherwise. Gradients
                that the module's own method leaves alone stay.
        """
        module, living = self._attached(), self._living()
        params = list(module.parameters())
        plain = self._replaced is None and type(module).zero_grad is torch.nn.Module.zero_grad
        there = [] if plain else [param for param in params if _is_there(param)]
        self._own(module)(*args, **kwargs)
        to_none = bool(kwargs.get("set_to_none", args[0] if args else True))
        if not plain:
            gone = [param for param in there if not _is_there(param)]
            params = params if len(gone) == len(there) else gone  # with all gone, it treats every parameter
            to_none = any(param.grad is None for param in gone or params)
        for optimizer in living:
            index = optimizer._binding.index
            optimizer._zero_some(sorted({index[id(p)] for p in params if id(p) in index}), to_none)


class StateDict(Method):
    """Puts copies of the master weights into the state_dict.

    The model holds the master weights meanwhile if a part of it saves what it computes from its weights.
    """

    NAME = "state_dict"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own method."""
        module = self._attached()
        keep_vars = bool(kwargs.get("keep_vars", args[2] if len(args) > 2 else False))
        outermost = [optimizer for optimizer in self._living() if not optimizer._saving]
        with ExitStack() as stack:
            for optimizer in outermost:
                stack.enter_context(optimizer._while_saving(module))
            state = self._own(module)(*args, **kwargs)
            given = kwargs.get("destination", args[0] if args else None)
            for optimizer in outermost:
                state = take_apart(optimizer, state, keep_vars=keep_vars)
                if given is not None and given is not state:  # a parent goes on with what it has given
                    take_apart(optimizer, given, keep_vars=keep_vars)
        return state

    @property
    def is_plain(self) -> bool:
        """True if the module's own method is that of its class."""
        return self._replaced is None


def forward_methods(optimizer: "BoundOptimizer", model: torch.nn.Module) -> None:
    """Let these methods of every module that holds parameters of the optimizer reach it.

    Modules that pickle their attributes in a way of their own keep their methods.
    """
    index = optimizer._binding.index
    for module in model.modules():
        if not any(id(param) in index for param in module.parameters()) or _pickles_itself(module):
            continue
        for kind in (ZeroGrad, StateDict):
            present = module.__dict__.get(kind.NAME)
            if not (isinstance(present, kind) and present.belongs_to(module)):
                present = module.__dict__[kind.NAME] = kind(module, _replaced(module, present, kind.NAME))
            present.add(optimizer)


def restore_methods(model: torch.nn.Module) -> None:
    """Leave a model whose optimizers are closed with the methods that it had."""
    for module in model.modules():
        for kind in (ZeroGrad, StateDict):
            present = module.__dict__.get(kind.NAME)
            if isinstance(present, kind) and present.belongs_to(module):
                present.leave(module)


def _pickles_itself(module: torch.nn.Module) -> bool:
    kind = type(module)
    own = kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__
    return own or isinstance(module, torch.jit.ScriptModule)


def _replaced(module: torch.nn.Module, present: Any, name: str) -> Any:
    """The user's replacement of a method, or None: copying or unpickling leaves replacements, too."""
    own = getattr(present, "__func__", None) is getattr(type(module), name)
    return None if own or isinstance(present, Method) else present


def _is_there(param: torch.Tensor) -> bool:
    grad = param.grad
    return grad is not None and (grad.layout != torch.strided or bool(grad.detach().any()))
