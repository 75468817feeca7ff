"""VRGD: torch optimizers on gradients weighted by their signal-to-noise ratio over the workers."""

from typing import Any

from .fused import FusedOptimizer, Params
from .optim import LAMB, LARS, SGD, Adam

__all__ = ["VRLAMB", "VRLARS", "VRSGD", "VRAdam"]


class VarianceReduced(FusedOptimizer):
    """What the four have beside their rule; each takes these as keywords.

    An element's ratio is r = g^2 / (its variance over the workers' gradients + gsnr_eps g^2), where g is its mean. It
    is divided by the mean of r in its parameter, clipped to [gsnr_floor, 1], and multiplies g before the rule sees it.
    Where a parameter's gradients do not vary at all, so always with one worker, the rule is the plain one. The variance
    needs no second all-reduce: whoever reduces an element has every worker's gradient of it.

    Source: Accelerating Large Batch Training via Gradient Signal to Noise Ratio (arXiv:2309.13681), which recommends
    8 workers or more.

    Args:
        gsnr_floor: the least weight of an element.
        gsnr_eps: bounds r by its inverse.
        layer_mean: "now": the mean of r of this step, which takes a second pass over memory; "last": that of the last
            step in which the parameter had a gradient, which takes none. Checkpoints do not hold it, so the first step
            after loading measures its own.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        gsnr_floor: float = 0.1,
        gsnr_eps: float = 1e-8,
        layer_mean: str = "now",
        choices: tuple[Any, ...] = (),
        **options: Any,
    ) -> None:
        own = {"gsnr_floor": gsnr_floor, "gsnr_eps": gsnr_eps, "lagged_mean": layer_mean == "last"}
        allowed = (*choices, ("layer_mean", layer_mean, ("now", "last")))
        super().__init__(params, defaults | own, choices=allowed, **options)


class VRSGD(SGD, VarianceReduced):
    """VR-SGD and, with momentum, VR-Momentum: `SGD` on gradients weighted by their signal-to-noise ratio.

    Source: arXiv:2309.13681.

    Args:
        args, kwargs: those of `SGD`, and `gsnr_floor`, `gsnr_eps`, `layer_mean` (see `VarianceReduced`).

    Raises:
        UsageError: on every rank, for arguments that cannot be.
    """

    RULE = "vrsgd"

    def __init__(self, params: Params, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)


class VRAdam(Adam, VarianceReduced):
    """VR-Adam: `Adam` on gradients weighted by an average of their signal-to-noise ratios, before either moment.

    Source: arXiv:2309.13681.

    Args:
        betas: decay of the averages of the gradient, of its square and of the ratio.
        args, kwargs: those of `Adam`, and `gsnr_floor`, `gsnr_eps`, `layer_mean` (see `VarianceReduced`).

    Raises:
        UsageError: on every rank, for arguments that cannot be.
    """

    RULE = "vradam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999, 0.9),
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, *args, **kwargs)


class VRLARS(LARS, VarianceReduced):
    """VR-LARS: `LARS` on gradients weighted by their signal-to-noise ratio. The step takes three passes over memory.

    Source: arXiv:2309.13681.

    Args:
        args, kwargs: those of `LARS`, and `gsnr_floor`, `gsnr_eps`, `layer_mean` (see `VarianceReduced`).

    Raises:
        UsageError: on every rank, for arguments that cannot be.
    """

    RULE = "vrlars"

    def __init__(self, params: Params, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)


class VRLAMB(LAMB, VarianceReduced):
    """VR-LAMB: `LAMB` on gradients weighted as `VRAdam`'s. The step takes three passes over memory.

    Source: arXiv:2309.13681.

    Args:
        betas: decay of the averages of the gradient, of its square and of the ratio.
        args, kwargs: those of `LAMB`, and `gsnr_floor`, `gsnr_eps`, `layer_mean` (see `VarianceReduced`).

    Raises:
        UsageError: on every rank, for arguments that cannot be.
    """

    RULE = "vrlamb"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999, 0.9),
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, *args, **kwargs)
