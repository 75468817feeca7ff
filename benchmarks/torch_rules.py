"""Every rule as one writes it with torch: the all-reduce of a flat gradient, then the update of the weights.

A `Rival` is one rank's copy of the model: its layers are views of one flat weight, their gradients of one flat
gradient, so that MPI reduces one buffer in place and element-wise rules see one tensor. A rule is a function of
the rival and its hyper-parameters that returns the STAGES of its step, which are called one after the other; most
are the reduction and one update. To add a rule, write that function and put it into RULES. Rules that look at the
workers' own gradients communicate twice: after a reduction only their mean is left.

The rivals get every saving: gradients come divided by the number of workers, as from who divides the loss, so
that their sum is the mean; SGD and Adam are torch's fused ones; the others go layer by layer, which keeps a layer
in cache between its operations and is faster than one `torch._foreach_*` operation over all layers after another;
nothing is allocated, and the gradient is overwritten where a rule no longer needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from rivals import Contestant, add_up

Stage = Callable[[], None]
Tensors = list[torch.Tensor]


class Rival(Contestant):
    """One step of a rule by mpi4py and torch.

    Args:
        comm: the ranks; each brings the same weights.
        weights: initial values, one tensor for each layer.
        grads: one flat tensor for each of this rank's workers, divided by the number of all workers. They
            stay intact; that backward has added them up is not part of the step.
        rule: a name in RULES.
        max_grad_norm: as the engine's.
        hyper: the rule's hyper-parameters.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        weights: Sequence[torch.Tensor],
        grads: Tensors,
        rule: str,
        *,
        max_grad_norm: float | None = None,
        **hyper: Any,
    ) -> None:
        self.comm, self.own, self.max_grad_norm = comm, grads, max_grad_norm
        self.shapes = [weight.shape for weight in weights]
        self.flat = torch.cat([weight.flatten() for weight in weights])
        self.flat.grad = torch.zeros_like(self.flat)
        self.buffer = self.flat.grad.numpy()
        self.layers, self.grads = self.layers_of(self.flat), self.layers_of(self.flat.grad)
        self.points = [self.flat] * len(grads)
        self.stages = RULES[rule](self, **hyper)

    def prepare(self) -> None:
        add_up(self.own, self.flat.grad)

    def step(self) -> None:
        for stage in self.stages:
            stage()

    def reduce(self) -> None:
        """The flat gradient becomes the mean over all workers, clipped where that is asked for."""
        self.comm.Allreduce(MPI.IN_PLACE, self.buffer)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.flat], self.max_grad_norm)

    @property
    def workers(self) -> int:
        """Of all ranks."""
        return int(self.comm.size) * len(self.own)

    def layers_of(self, flat: torch.Tensor) -> Tensors:
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def new_state(self) -> Tensors:
        """Zeros for each layer."""
        return [torch.zeros_like(layer) for layer in self.layers]

    def new_scratch(self) -> Tensors:
        """For each layer, but all in the same memory."""
        scratch = torch.empty(max(shape.numel() for shape in self.shapes))
        return [scratch[: shape.numel()].view(shape) for shape in self.shapes]


class DisplacedRival(Rival):
    """A rival that then displaces each worker by its own gradient, which must survive: the sum is a copy of it."""

    def __init__(self, comm: MPI.Comm, *args: Any, inner_lr: float, **options: Any) -> None:
        super().__init__(comm, *args, **options)
        self.points = [self.flat.clone() for _ in self.own]
        self.rate = inner_lr * self.workers

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        super().prepare()
        super().step()
        for g, x in zip(self.own, self.points, strict=True):
            torch.sub(self.flat, g, alpha=self.rate, out=x)


def make_rival(
    comm: MPI.Comm,
    weights: Sequence[torch.Tensor],
    grads: Tensors,
    rule: str,
    *,
    extrapolation: str = "none",
    **options: Any,
) -> Rival:
    """The rival of an engine with these options."""
    rule = f"{rule}, gain" if "gain" in options else rule
    return {"none": Rival, "local": DisplacedRival}[extrapolation](comm, weights, grads, rule, **options)


def has_rival(rule: str) -> bool:
    """Whether this rule is written here."""
    return rule in RULES


# --- rules ---


def sgd(rival: Rival, lr: float, momentum: float = 0.0) -> list[Stage]:
    return [rival.reduce, torch.optim.SGD([rival.flat], lr=lr, momentum=momentum, fused=True).step]


def adascale(rival: Rival, lr: float, momentum: float = 0.0, gain: int = 0) -> list[Stage]:
    """SGD whose rate is multiplied by AdaScale's gain, this step's or, lagging, the one before's."""
    optimizer = torch.optim.SGD([rival.flat], lr=lr, momentum=momentum, fused=True)
    estimate, workers = GainEstimate(rival.workers), rival.workers
    spread = np.zeros(1)

    def reduce_squares() -> None:
        spread[0] = workers * sum(torch.dot(own, own).item() for own in rival.own)
        rival.comm.Allreduce(MPI.IN_PLACE, spread)

    def update() -> None:
        mean = torch.dot(rival.flat.grad, rival.flat.grad).item()
        gains = estimate.gain(), estimate.after(spread[0], mean)
        optimizer.param_groups[0]["lr"] = lr * gains[0 if gain else 1]
        optimizer.step()

    return [reduce_squares, rival.reduce, update]


class GainEstimate:
    """AdaScale's running averages of the variance of a worker's gradient and of the true gradient's square."""

    def __init__(self, workers: int) -> None:
        self.workers, self.var, self.sqr, self.samples = workers, 0.0, 0.0, 0

    def gain(self) -> float:
        if not self.samples:
            return 1.0
        return (self.var + self.sqr) / (self.var / self.workers + self.sqr)

    def after(self, spread: float, mean: float) -> float:
        """The gain with one more sample: the workers' mean squared norm, and that of their mean."""
        var = (spread - mean) * self.workers / (self.workers - 1)
        self.samples += 1
        newest = max(1 / self.samples, self.workers / 1000)
        self.var += newest * (max(var, 1e-6) - self.var)
        self.sqr += newest * (max(mean - var / self.workers, 0.0) - self.sqr)
        return self.gain()


def vrsgd(rival: Rival, lr: float, momentum: float = 0.0, **own: Any) -> list[Stage]:
    ratios = SignalToNoise(rival, **own)
    _, update = sgd(rival, lr, momentum)

    def weigh() -> None:
        for g, ratio in ratios.by_layer():
            g.mul_(ratio)

    return [rival.reduce, ratios.reduce, weigh, update]


def adam(
    rival: Rival, lr: float, betas: tuple[float, float] = (0.9, 0.999), amsgrad: bool = False
) -> list[Stage]:
    optimizer = torch.optim.Adam([rival.flat], lr=lr, betas=betas, amsgrad=amsgrad, fused=True)
    return [rival.reduce, optimizer.step]


def vradam(
    rival: Rival, lr: float, betas: tuple[float, float, float] = (0.9, 0.999, 0.9), **own: Any
) -> list[Stage]:
    _, update = adam(rival, lr, betas[:2])
    return [*smoothly_weighted(rival, betas[2], **own), update]


def eg(
    rival: Rival,
    lr: float,
    momentum: float = 0.9,
    smoothing: float = 0.9,
    lr_gain: float = 1e-3,
    lr_scale: float = 1e-3,
) -> list[Stage]:
    flat_step, scale = torch.zeros_like(rival.flat), 1.0
    log_gains, means, steps = rival.new_state(), rival.new_state(), rival.layers_of(flat_step)
    scratch = rival.new_scratch()

    def update() -> None:
        nonlocal scale
        agreement = torch.dot(flat_step, rival.flat.grad).item()
        scale *= math.exp(min(max(lr_scale * agreement, -1.0), 1.0))
        for w, g, log_gain, mean, step, out in zip(
            rival.layers, rival.grads, log_gains, means, steps, scratch, strict=True
        ):
            log_gain.add_(torch.mul(mean, g, out=out).mul_(lr_gain).clamp_(-1, 1))
            mean.lerp_(g, 1 - smoothing)
            step.mul_(momentum).addcmul_(torch.exp(log_gain, out=out), g, value=lr)
            w.sub_(step, alpha=scale)

    return [rival.reduce, update]


def sgdp(
    rival: Rival,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    eps: float = 1e-8,
) -> list[Stage]:
    buffers, products = rival.new_state(), rival.new_scratch()

    def update() -> None:
        for w, g, buffer, product in zip(rival.layers, rival.grads, buffers, products, strict=True):
            buffer.mul_(momentum).add_(g)
            along = part_along(w, g, buffer, product, delta, eps)
            decay = lr * weight_decay / (1 - momentum)
            shrink(w, decay if along is None else decay * wd_ratio, along, lr)
            w.sub_(buffer, alpha=lr)

    return [rival.reduce, update]


def adamp(
    rival: Rival,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
) -> list[Stage]:
    means, squares = rival.new_state(), rival.new_state()
    roots, directions = rival.new_scratch(), rival.new_scratch()
    steps = count(1)

    def update() -> None:
        unbias1, unbias2 = corrections(betas, next(steps))
        rate = lr * unbias1 / unbias2
        for w, g, mean, square, root, p in zip(
            rival.layers, rival.grads, means, squares, roots, directions, strict=True
        ):
            average(mean, square, g, betas)
            denominator = torch.sqrt(square, out=root).add_(eps / unbias2)
            numerator = torch.lerp(mean, g, 1 - betas[0], out=p) if nesterov else mean
            torch.div(numerator, denominator, out=p)
            along = part_along(w, g, p, root, delta, eps)
            decay = lr * weight_decay
            shrink(w, decay if along is None else decay * wd_ratio, along, rate)
            w.sub_(p, alpha=rate)

    return [rival.reduce, update]


def lars(
    rival: Rival,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
) -> list[Stage]:
    buffers = rival.new_state()

    def rate(w: float, g: float) -> float:
        return lr * trust_coefficient * w / (g + weight_decay * w + eps) if w and g else lr

    def update() -> None:
        for w, g, buffer in zip(rival.layers, rival.grads, buffers, strict=True):
            alpha = rate(w.norm().item(), g.norm().item())
            if weight_decay:
                g.add_(w, alpha=weight_decay)
            w.sub_(buffer.mul_(momentum).add_(g, alpha=alpha))

    return [rival.reduce, update]


def clars(
    rival: Rival, lr: float, momentum: float = 0.9, trust_coefficient: float = 1e-3, eps: float = 1e-8
) -> list[Stage]:
    buffers, owns = rival.new_state(), [rival.layers_of(own) for own in rival.own]
    norms = np.zeros(len(rival.layers))

    def reduce_norms() -> None:
        norms[:] = sum(torch.stack(torch._foreach_norm(own)).numpy() for own in owns)
        rival.comm.Allreduce(MPI.IN_PLACE, norms)

    def update() -> None:
        for w, g, buffer, norm in zip(rival.layers, rival.grads, buffers, norms.tolist(), strict=True):
            length = w.norm().item()
            alpha = lr * trust_coefficient * length / (norm + eps) if length and norm else lr
            w.sub_(buffer.mul_(momentum).add_(g, alpha=alpha))

    return [reduce_norms, rival.reduce, update]


def lamb(
    rival: Rival,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> list[Stage]:
    means, squares, directions = rival.new_state(), rival.new_state(), rival.new_scratch()
    steps = count(1)

    def update() -> None:
        unbias1, unbias2 = corrections(betas, next(steps))
        for w, g, mean, square, u in zip(rival.layers, rival.grads, means, squares, directions, strict=True):
            average(mean, square, g, betas)
            denominator = torch.sqrt(square, out=g).add_(eps / unbias2)
            torch.mul(w, weight_decay, out=u).addcdiv_(mean, denominator, value=unbias1 / unbias2)
            w.add_(u, alpha=-lr * trust(w, u))

    return [rival.reduce, update]


def vrlamb(
    rival: Rival, lr: float, betas: tuple[float, float, float] = (0.9, 0.999, 0.9), **own: Any
) -> list[Stage]:
    _, update = lamb(rival, lr, betas[:2])
    return [*smoothly_weighted(rival, betas[2], **own), update]


def lans(
    rival: Rival,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> list[Stage]:
    means, squares = rival.new_state(), rival.new_state()
    roots, directions = rival.new_scratch(), rival.new_scratch()
    steps = count(1)

    def update() -> None:
        unbias1, unbias2 = corrections(betas, next(steps))
        for w, g, mean, square, root, p in zip(
            rival.layers, rival.grads, means, squares, roots, directions, strict=True
        ):
            g.mul_(1 / (g.norm().item() + eps))
            average(mean, square, g, betas)
            denominator = torch.sqrt(square, out=root).add_(eps / unbias2)
            torch.mul(w, weight_decay, out=p).addcdiv_(mean, denominator, value=unbias1 / unbias2)
            q = g.div_(denominator).mul_(1 / unbias2).add_(w, alpha=weight_decay)
            rate_p, rate_q = lr * betas[0] * trust(w, p), lr * (1 - betas[0]) * trust(w, q)
            w.add_(p, alpha=-rate_p).add_(q, alpha=-rate_q)

    return [rival.reduce, update]


RULES: dict[str, Callable[..., list[Stage]]] = {
    "sgd": sgd,
    "sgd, gain": adascale,
    "vrsgd": vrsgd,
    "adam": adam,
    "vradam": vradam,
    "eg": eg,
    "sgdp": sgdp,
    "adamp": adamp,
    "lars": lars,
    "clars": clars,
    "lamb": lamb,
    "vrlamb": vrlamb,
    "lans": lans,
}


# --- what Adam's relatives share ---


def corrections(betas: tuple[float, float], step: int) -> tuple[float, float]:
    """What the average of the gradients, and the root of that of their squares, are multiplied by."""
    return 1 / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)


def average(mean: torch.Tensor, square: torch.Tensor, g: torch.Tensor, betas: tuple[float, float]) -> None:
    mean.lerp_(g, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])


def trust(w: torch.Tensor, u: torch.Tensor) -> float:
    weight, update = w.norm().item(), u.norm().item()
    return weight / update if weight and update else 1.0


# --- what AdamP and SGDP share ---


def part_along(
    w: torch.Tensor, g: torch.Tensor, p: torch.Tensor, product: torch.Tensor, delta: float, eps: float
) -> torch.Tensor | None:
    """By how many w each filter's p goes along it, or the layer's, if the gradient can only turn these weights."""
    if w.dim() < 2:
        return None
    lengths, slopes = w.norm(dim=1, keepdim=True), g.norm(dim=1, keepdim=True)
    slanting = torch.mul(w, g, out=product).sum(1, keepdim=True)
    filters = turns(slanting, lengths, slopes, delta / math.sqrt(w.shape[1]), eps)
    if not filters and not turns(
        slanting.sum(), lengths.norm(), slopes.norm(), delta / math.sqrt(w.numel()), eps
    ):
        return None
    along = torch.mul(w, p, out=product).sum(1, keepdim=True)
    return along / (lengths + eps) ** 2 if filters else along.sum() / (lengths.norm() + eps) ** 2


def turns(
    slanting: torch.Tensor, length: torch.Tensor, slope: torch.Tensor, limit: float, eps: float
) -> bool:
    """Whether all cosines are below the limit."""
    cosines = slanting.abs() / (length.clamp(min=eps) * slope.clamp(min=eps))
    return cosines.max().item() < limit


def shrink(w: torch.Tensor, decay: float, along: torch.Tensor | None, rate: float) -> None:
    """By the decay; and the step that is to follow goes along the weights, which is made up for in advance."""
    if along is not None:
        w.mul_(along.mul(rate).add_(1 - decay))
    elif decay:
        w.mul_(1 - decay)


# --- what the rules of VRGD share ---


class SignalToNoise:
    """For each element, the square of the mean gradient over the workers' variance, as VRGD weighs it.

    That variance is the mean of the squares less the square of the mean; the all-reduce of the squares is a second
    one, as long as that of the gradients.
    """

    def __init__(
        self, rival: Rival, gsnr_floor: float = 0.1, gsnr_eps: float = 1e-8, lagged_mean: bool = False
    ) -> None:
        self.rival, self.floor, self.eps, self.lagged = rival, gsnr_floor, gsnr_eps, lagged_mean
        self.flat = torch.zeros_like(rival.flat)
        self.squares, self.scratch = rival.layers_of(self.flat), rival.new_scratch()
        self.means: list[float] = []

    def reduce(self) -> None:
        """The sum of the squared gradients, each over K."""
        torch.mul(self.rival.own[0], self.rival.own[0], out=self.flat)
        for own in self.rival.own[1:]:
            self.flat.addcmul_(own, own)
        self.rival.comm.Allreduce(MPI.IN_PLACE, self.flat.numpy())

    def by_layer(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's gradient and weights; K is left out, as they are divided by their mean."""
        share, last, self.means = 1 / self.rival.workers, self.means, []
        for i, (g, square, out) in enumerate(zip(self.rival.grads, self.squares, self.scratch, strict=True)):
            variance = square.addcmul_(g, g, value=-share).clamp_(min=TINY)
            noise = variance.addcmul_(g, g, value=self.eps * share)
            ratio = torch.mul(g, g, out=out).div_(noise)
            self.means.append(ratio.mean().item())
            mean = last[i] if self.lagged and last else self.means[i]
            yield g, ratio.mul_(1 / mean if mean else 1.0).clamp_(self.floor, 1)


TINY = 1e-30  # a variance where all gradients are zero; rounding may leave less


def smoothly_weighted(rival: Rival, beta: float, **own: Any) -> list[Stage]:
    """The reduced gradient, times an average of the weights."""
    ratios, averages = SignalToNoise(rival, **own), rival.new_state()
    steps = count(1)

    def weigh() -> None:
        unbias = 1 / (1 - beta ** next(steps))
        for smooth, (g, ratio) in zip(averages, ratios.by_layer(), strict=True):
            g.mul_(smooth.lerp_(ratio, 1 - beta)).mul_(unbias)

    return [rival.reduce, ratios.reduce, weigh]
