"""torch optimizers whose step is one collective."""

from typing import TYPE_CHECKING, Any, TypedDict

from .adascale import AdaScale
from .fused import FusedOptimizer, Params
from .hyper import InnerRate
from .world import World

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CLARS", "LAMB", "LANS", "LARS", "SGD", "Adam", "AdamW", "ExtrapAdam", "ExtrapSGD"]


class Options(TypedDict, total=False):
    """What every optimizer here takes beside its rule's hyper-parameters; `SGD` explains them."""

    extrapolation: str
    inner_lr: InnerRate
    displacement: str
    inner_clip: bool
    noise: float
    seed: int
    world: World | None
    tile: int | None
    max_grad_norm: float | None
    skip_nonfinite: bool
    accumulation: str
    gradients: str
    overlap: bool
    bucket: int
    gain: AdaScale | None
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool | None
    differentiable: bool | None


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
        extrapolation: "none", "local" (each worker's own last gradient), "global" (the last mean gradient),
            "anisotropic" (own less mean), or random for each worker and step: "gaussian", "uniform" in [-1, 1), or
            "filter" (gaussian, as long as the filter of new weights that it displaces: the weights of one output, so
            of parameters with two or more dimensions; others take inner_lr=0).
        inner_lr: inner learning rate of the extrapolation: a number, "lr", "lr/K", a function of lr, or "noise": lr
            times the workers' noise over their signal, at most lr. The point published at the end of a step uses that
            step's lr.
        displacement: "preconditioned": gradients displace in units of the rule's steps, so divided by Adam's
            denominator and multiplied by a trust ratio, if the rule has them; "raw": in their own units.
        inner_clip: with max_grad_norm, gradients displace with the same coefficient; False: unclipped.
        noise: scale of random displacements.
        seed: of random displacements, alike on all ranks.
        world: a World; one over MPI.COMM_WORLD by default.
        tile: elements that go through all stages before the next ones; by default the engine finds out what suits.
            Results do not depend on it.
        max_grad_norm: scale the mean gradient down to this norm if it is longer, and each worker's displacement by
            the same factor; the step then takes a second pass over memory.
        skip_nonfinite: let a step whose mean gradient is not finite change nothing on any rank; likewise.
        accumulation: "mean" or "sum" of the micro-batches that `no_sync()` counts.
        gradients: how they reach shared memory: "copy" (in one batch, when the step begins), "hook" (each as soon as
            autograd has it) or "view" (autograd adds to zeros there: zero_grad() leaves such).
        overlap: with several teams, send their sums of gradients while backward() is still running; what changed
            between backward() and step() is sent again. Gradients then reach shared memory by hooks. In one team it
            does nothing.
        bucket: elements whose sums are sent together with overlap, the last layers first; at least one layer.
        gain: an `AdaScale` of this optimizer's own: each step's learning rates are multiplied by its gain, before
            inner rates follow from them, and nothing else is.
        maximize: take the negative of every worker's gradient as it is read, so that the objective grows; worker k is
            then displaced to w + inner_lr * (its own last gradient). A group of parameters may have its own.
        foreach, fused: accepted and without effect, as the step is one pass in any case.
        capturable, differentiable: False or None, as no optimizer here has them.

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
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


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
        amsgrad: divide by the largest average of squares so far instead of the present one (On the Convergence of Adam
            and Beyond, arXiv:1904.09237). It takes a third slot, `max_exp_avg_sq`; displacements divide by the same.
        decoupled_weight_decay: shrink the weights themselves by lr * weight_decay (AdamW).
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("decoupled_weight_decay", True)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)


class ExtrapAdam(Adam):
    """Adam whose workers extrapolate with their own last gradient, divided by Adam's denominator.

    Worker k's next gradient is taken at w - inner_lr * g_k / (sqrt(v) + eps), where v is the bias-corrected second
    moment that all share; `displacement="raw"` leaves the gradient as it is.

    Source: Extrapolation for Large-batch Training in Deep Learning (ICML 2020).
    """

    def __init__(self, params: Params, *args: Any, extrapolation: str = "local", **kwargs: Any) -> None:
        super().__init__(params, *args, extrapolation=extrapolation, **kwargs)


class LARS(FusedOptimizer):
    """LARS: momentum SGD in which every layer's rate is multiplied by trust_coefficient |w| / (|g| + weight_decay |w|).

    Source: Large Batch Training of Convolutional Networks (arXiv:1708.03888), equation 6. A layer with a zero norm
    takes the ratio 1. The step takes a second pass over memory.

    Args:
        params: parameters, or dicts of them; biases and norms usually form a group with `adapt=False` and no decay.
        lr: learning rate.
        momentum: momentum factor.
        weight_decay: coefficient of the decay, added to the gradient and counted in the ratio.
        trust_coefficient: eta of the paper.
        eps: added to the denominator of the ratio.
        adapt: False takes the ratio 1.
        always_adapt: also where there is no decay; False: such groups take the ratio 1, as in timm.
        trust_clip: let no ratio be above 1, also in the displacement's factor. (timm and apex divide it by lr first.)
        trust: where the ratio stands: "paper" (with lr in the buffer), "inside" (in the buffer without lr, as timm and
            apex), or "outside" (applied to the buffer).
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "lars"

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        adapt: bool = True,
        always_adapt: bool = True,
        trust_clip: bool = False,
        trust: str = "paper",
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": adapt,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
            "trust_in_buffer": trust == "inside",
            "trust_outside": trust == "outside",
        }
        choices = (("trust", trust, ("paper", "inside", "outside")),)
        super().__init__(params, defaults, choices=choices, **options)


class CLARS(LARS):
    """CLARS: `LARS` whose ratio is trust_coefficient |w| over the mean of the norms of the workers' own gradients.

    That mean is never below the norm of the mean gradient, so early rates are smaller and warm-up is not needed. Each
    worker's gradient takes its decay before its norm. The step takes a second pass over memory.

    Source: Large Batch Training Does Not Need Warmup (arXiv:2002.01576), with one gradient per worker as the samples;
    `trust="outside"`, the default, is where the authors' code has the ratio.
    """

    RULE = "clars"

    def __init__(self, params: Params, *args: Any, trust: str = "outside", **kwargs: Any) -> None:
        super().__init__(params, *args, trust=trust, **kwargs)


class LAMB(FusedOptimizer):
    """LAMB: Adam whose direction u is scaled by |w| / |u| in every layer.

    Source: Large Batch Optimization for Deep Learning (arXiv:1904.00962), Algorithm 2, with the identity for phi.
    Implementations clip the gradient's norm to 1 first: give `max_grad_norm=1.0` for that. A layer with a zero norm
    takes the ratio 1. The step takes a second pass over memory, and a third when it clips.

    Args:
        params: parameters, or dicts of them; biases and norms usually form a group with `adapt=False` and no decay.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: coefficient of the decay, which is part of u unless coupled.
        adapt: False takes the ratio 1.
        coupled_weight_decay: add the decay to the gradient instead.
        always_adapt: also where there is no decay; otherwise such groups take the ratio 1, as in apex.
        trust_clip: let no ratio be above 1, also in the displacement's factor.
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "lamb"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adapt: bool = True,
        coupled_weight_decay: bool = False,
        always_adapt: bool = False,
        trust_clip: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt": adapt,
            "coupled_weight_decay": coupled_weight_decay,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
        }
        super().__init__(params, defaults, **options)


class LANS(FusedOptimizer):
    """LANS: LAMB on each layer's normalised gradient, with a Nesterov-like second direction.

    Source: Accelerated Large Batch Optimization of BERT Pretraining in 54 minutes (arXiv:2006.13484), Algorithm 2. A
    layer with a zero norm takes the ratio 1. The step takes three passes over memory.

    Args:
        params: parameters, or dicts of them; biases and norms usually form a group with `adapt=False` and no decay.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominators.
        weight_decay: coefficient of the decay.
        adapt: False takes the ratio 1.
        options: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "lans"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adapt: bool = True,
        **options: "Unpack[Options]",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, defaults, **options)
