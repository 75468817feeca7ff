"""Mixed precision: a loss scale that all ranks change alike."""

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from .errors import UsageError
from .fused import FusedOptimizer

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler for optimizers of this library: the mean gradient decides, so all ranks skip the same steps.

    The scale divides the gradients inside the step, so there is no pass to unscale them. Other
    optimizers are treated as torch treats them.

    Args: as torch.amp.GradScaler.

    Example:
        >>> import torch, extrapcomm as xc
        >>> model = torch.nn.Linear(2, 1)
        >>> opt, scaler = xc.SGD(model.parameters(), lr=0.1), xc.GradScaler("cpu", init_scale=8.0)
        >>> scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        >>> scaler.step(opt)
        >>> scaler.update()
        >>> opt.close()
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As torch's, on this rank's gradients; only needed to look at them.

        Raises:
            UsageError: for several workers per rank, of which one alone is bound.
        """
        if isinstance(optimizer, FusedOptimizer) and optimizer.world.workers > 1:
            raise UsageError(
                f"unscale_() sees one of this rank's {optimizer.world.workers} workers; the step unscales all, and "
                "max_grad_norm clips"
            )
        super().unscale_(optimizer)
        if self._enabled and isinstance(optimizer, FusedOptimizer):
            optimizer.unscaled(self.get_scale())

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Collective: a step that divides by the scale, and is skipped on all ranks if the mean is not finite.

        Raises:
            RuntimeError: if called twice without update().
            UsageError, MismatchError, PeerError: as the optimizer's own step; a scale that differs is a mismatch.
        """
        if not (self._enabled and isinstance(optimizer, FusedOptimizer)):
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update()")
        scale = 1.0 if state["stage"] is OptState.UNSCALED else self.get_scale()
        result = optimizer.scaled_step(scale, *args, **kwargs)
        found = torch.full((), float(optimizer.skipped), dtype=torch.float32, device=self._device)
        state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.STEPPED
        return result
