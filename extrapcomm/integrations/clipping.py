"""Clipping that trainers ask for between backward and step, done in the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UsageError
from ..fused import FusedOptimizer

__all__ = ["Clipping", "refuse_clipping_by_value", "require_one_worker", "unwrapped"]


class Clipping:
    """Stands in for `clip_grad_norm_` of one optimizer: its step clips, and its step knows the norm.

    The norm of the mean gradient exists only within the step, so `by_norm` returns a tensor that holds the last
    step's norm (nan before the first) until the next step puts its own there. Trainers log it after the step.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer: Any = optimizer
        self._norm = torch.tensor(math.nan, dtype=torch.float32, device="cpu")
        optimizer.register_step_post_hook(lambda *_: self._take_norm())

    def concerns(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether these are the optimizer's parameters; others may be among them if they have no gradient.

        Raises:
            UsageError: if some are missing, or if parameters of another optimizer are among them.
        """
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        given = {id(p): p for p in parameters}
        if own.isdisjoint(given):
            return False
        if own - given.keys() or any(p.grad is not None for i, p in given.items() if i not in own):
            raise UsageError(
                "the fused step clips by one norm over all parameters of its optimizer: give just these"
            )
        return True

    def by_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip from the next step on; infinity only measures.

        Args:
            max_norm: bound of the norm of the mean gradient.
            norm_type: 2, the only norm that the step takes.

        Returns:
            The norm before clipping, once the next step has been taken.

        Raises:
            UsageError: for another norm, or a bound that is not positive.
        """
        if float(norm_type) != 2.0:
            raise UsageError(f"the fused step clips by the 2-norm, not by norm_type={norm_type!r}")
        self._optimizer.max_grad_norm = float(max_norm)
        self._norm = self._norm.clone()
        return self._norm

    def _take_norm(self) -> None:
        if self._optimizer.grad_norm is not None:
            self._norm.fill_(self._optimizer.grad_norm)


def refuse_clipping_by_value(*_: Any, **__: Any) -> None:
    """Raises UsageError: each rank would clip the elements of its own gradient, not those of the mean."""
    raise UsageError(
        "clipping by value would clip each rank's own gradient, not the mean of all; clip by norm, which the fused "
        "step does"
    )


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, without the wrappers of Accelerate or Lightning."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def require_one_worker(optimizer: FusedOptimizer) -> None:
    """Trainers run forward and backward once per process."""
    if optimizer.world.workers != 1:
        raise UsageError(
            f"a trainer runs one worker per rank, and this optimizer has {optimizer.world.workers}: use "
            "World(workers=1) and more ranks"
        )
