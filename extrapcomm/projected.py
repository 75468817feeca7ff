"""Optimizers that keep momentum from lengthening scale-invariant weights: AdamP and SGDP."""

from typing import TYPE_CHECKING

from .fused import FusedOptimizer, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .optim import Options

__all__ = ["SGDP", "AdamP"]


class AdamP(FusedOptimizer):
    """AdamP: Adam whose direction is projected where weights are scale-invariant, so that they turn but do not grow.

    Source: AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights (arXiv:2006.08217),
    Algorithm 2, and the authors' code. A parameter's filters (what lies under one index of its first dimension) count
    as scale-invariant if for every one of m elements |cos(gradient, weights)| < delta / sqrt(m); then each filter's
    direction loses its part along the filter. Otherwise the same is tried with the whole parameter as one vector. A
    filter of zeros, or with a gradient of zeros, has cosine 0; parameters of one dimension are never projected. The
    step takes a second pass over memory.

    Args:
        params: parameters, or dicts of them with their own hyper-parameters; the filters of each must lie one after
            the other in memory, as in channels-last and in contiguous ones.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator and to the norm of a filter; no norm counts for less in the cosine.
        weight_decay: the weights shrink by lr * weight_decay.
        delta: how far from orthogonal the gradient of scale-invariant weights may be.
        wd_ratio: what scale-invariant weights take of the decay.
        nesterov: Nesterov momentum.
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.

    Example:
        >>> import torch, extrapcomm as xc
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> opt = xc.AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> model(torch.ones(1, 2)).square().sum().backward()
        >>> opt.step()
        >>> opt.close()
    """

    RULE = "adamp"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, **options)


class SGDP(FusedOptimizer):
    """SGDP: momentum SGD whose update is projected where weights are scale-invariant; `AdamP` says how.

    Source: AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights (arXiv:2006.08217),
    Algorithm 1, and the authors' code: the buffer starts at zero, so the first gradient is dampened too, and the decay
    is decoupled. The buffer itself is never projected, as in the paper; in the authors' code it is, where there is no
    Nesterov momentum. The step takes a second pass over memory.

    Args:
        params: as for `AdamP`.
        lr: learning rate.
        momentum: momentum factor, below 1.
        dampening: dampening of the momentum.
        weight_decay: the weights shrink by lr * weight_decay / (1 - momentum).
        nesterov: Nesterov momentum; needs momentum and no dampening.
        eps: added to the norm of a filter; no norm counts for less in the cosine.
        delta: how far from orthogonal the gradient of scale-invariant weights may be.
        wd_ratio: what scale-invariant weights take of the decay.
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "sgdp"

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
        }
        super().__init__(params, defaults, **options)
