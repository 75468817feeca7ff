"""`model.zero_grad()` of an attached model, which must also reach gradients that the model does not show."""

import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .bound import BoundOptimizer

__all__ = ["ZeroGrad", "forward_zero_grad"]


class ZeroGrad:
    """A module's `zero_grad`, which lets its optimizers zero or drop the gradients of their parameters, too.

    It keeps neither the module nor an optimizer alive. In a copied or unpickled module it does what torch's does.

    Args:
        module: whose method this is.
        replaced: what the user had put in place of the method of the module's class, or None.
    """

    def __init__(self, module: torch.nn.Module, replaced: Any = None) -> None:
        self._module = weakref.ref(module)
        self._replaced = replaced
        self._optimizers: list[weakref.ref[BoundOptimizer]] = []

    def add(self, optimizer: "BoundOptimizer") -> None:
        """Reach this optimizer, too."""
        if all(reference() is not optimizer for reference in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Zero or drop the gradients of all parameters of the module, with every worker.

        Args:
            args, kwargs: those of the module's own method, which is called with them. `set_to_none=False` among them,
                or as the first one, makes zeros of the optimizers' gradients; they are dropped otherwise.
        """
        if (module := self._module()) is None:
            return
        for reference in self._optimizers:
            optimizer = reference()
            if optimizer is not None and not optimizer._closed:
                _zero(optimizer, module, bool(kwargs.get("set_to_none", args[0] if args else True)))
        if self._replaced is not None:
            self._replaced(*args, **kwargs)
        else:
            type(module).zero_grad(module, *args, **kwargs)

    def __reduce__(self) -> Any:
        return ZeroGrad, (self._module(), self._replaced)


def forward_zero_grad(optimizer: "BoundOptimizer", model: torch.nn.Module) -> None:
    """Let `zero_grad()` of every module that holds parameters of the optimizer reach it."""
    index = optimizer._binding.index
    for module in model.modules():
        if not any(id(param) in index for param in module.parameters()):
            continue
        present = module.__dict__.get("zero_grad")
        if not isinstance(present, ZeroGrad):
            present = module.__dict__["zero_grad"] = ZeroGrad(module, present)
        present.add(optimizer)


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
