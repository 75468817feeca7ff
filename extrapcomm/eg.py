"""Momentum SGD whose step sizes are learned by exponentiated gradients."""

from typing import TYPE_CHECKING

from .fused import FusedOptimizer, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .optim import Options

__all__ = ["EG"]


class EG(FusedOptimizer):
    """Momentum SGD with a gain for every element and a scale for all, both learned by exponentiated gradients.

    An element's gain is multiplied by exp(lr_gain * average * gradient) at every step, where the average is of its past
    gradients; the scale by exp(lr_scale * <momentum, gradient>), over all parameters. No exponent leaves [-1, 1]. The
    step takes a second pass over memory. The scale is the group's `scale`, which the optimizer itself revises.

    Source: Step-size Adaptation Using Exponentiated Gradient Updates (arXiv:2202.00145).

    Args:
        params: parameters, or dicts of them with their own hyper-parameters.
        lr: learning rate.
        momentum: decay of the momentum, which holds gradients times lr and gain.
        smoothing: decay of the average of the gradients.
        lr_gain: rate of the elements' gains.
        lr_scale: rate of the scale.
        weight_decay: coefficient of the decay, added to the gradient.
        scale: the scale to begin with.
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "eg"

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        smoothing: float = 0.9,
        lr_gain: float = 1e-3,
        lr_scale: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        scale: float = 1.0,
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "smoothing": smoothing,
            "lr_gain": lr_gain,
            "lr_scale": lr_scale,
            "weight_decay": weight_decay,
            "scale": scale,
        }
        super().__init__(params, defaults, **options)
