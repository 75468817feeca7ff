"""torch optimizers whose step is one collective."""

from typing import Any

from .fused import FusedOptimizer, Params
from .hyper import InnerRate
from .world import World

__all__ = ["SGD", "Adam", "AdamW", "ExtrapSGD"]


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, fused with the reduction over all workers.

    The same update as torch.optim.SGD on the mean gradient; and with extrapolation each worker's next gradient is
    taken at a displaced point.

    Args:
        params: parameters, or dicts of them with their own hyper-parameters, as for any torch optimizer.
        lr: learning rate.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: coefficient of the decay, added to the gradient unless decoupled.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        decoupled_weight_decay: shrink the weights themselves by lr * weight_decay.
        extrapolation: "none", "local" (each worker's own last gradient) or "global" (the last mean gradient).
        inner_lr: inner learning rate of the extrapolation: a number, "lr", "lr/K", or a function of lr. The point
            published at the end of a step uses that step's lr.
        world: a World; one over MPI.COMM_WORLD by default.
        tile: elements that go through all stages before the next ones; results do not depend on it.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.

    Example:
        >>> import torch, extrapcomm as xc
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = xc.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> opt.close()
    """

    RULE = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        extrapolation: str = "none",
        inner_lr: InnerRate = "lr/K",
        world: World | None = None,
        tile: int = 512,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extrapolation, inner_lr, world, tile)


class ExtrapSGD(SGD):
    """EXTRAP-SGD: `SGD` whose workers extrapolate with their own last gradient by default.

    Source: Extrapolation for Large-batch Training in Deep Learning (ICML 2020).
    """

    def __init__(self, params: Params, *args: Any, extrapolation: str = "local", **kwargs: Any) -> None:
        super().__init__(params, *args, extrapolation=extrapolation, **kwargs)


class Adam(FusedOptimizer):
    """Adam, fused with the reduction over all workers; the same update as torch.optim.Adam on the mean gradient.

    Args:
        params: parameters, or dicts of them with their own hyper-parameters.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: coefficient of the decay, added to the gradient unless decoupled.
        decoupled_weight_decay: shrink the weights themselves by lr * weight_decay (AdamW).
        extrapolation: only "none"; `inner_lr` has no effect then.
        inner_lr: see `SGD`.
        world: a World; one over MPI.COMM_WORLD by default.
        tile: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        extrapolation: str = "none",
        inner_lr: InnerRate = "lr/K",
        world: World | None = None,
        tile: int = 512,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extrapolation, inner_lr, world, tile)


class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("decoupled_weight_decay", True)
        super().__init__(params, lr, betas, eps, weight_decay, **kwargs)
