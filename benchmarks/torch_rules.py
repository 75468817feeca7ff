"""Every rule as one writes it with torch: the all-reduce of a flat gradient, then the update of the weights.

A `Rival` is one rank's copy of the model: its layers are views of one flat weight, their gradients of one flat
gradient, so that MPI reduces one buffer in place and element-wise rules see one tensor. A rule is a function of
the rival and its hyper-parameters that returns the STAGES of its step, which are called one after the other; most
are the reduction and one update. To add a rule, write that function and put it into RULES.

The rivals get every saving: gradients come divided by the number of workers, as from who divides the loss, so
that their sum is the mean; SGD and Adam are torch's fused ones; the others go layer by layer, which keeps a layer
in cache between its operations and is faster than one `torch._foreach_*` operation over all layers after another;
nothing is allocated, and the gradient is overwritten where a rule no longer needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from mpi4py import MPI
from rivals import Contestant, add_up

Stage = Callable[[], None]
Tensors = list[torch.Tensor]


class Rival(Contestant):
    """One step of a rule by mpi4py and torch.

    Args:
        comm: the ranks; each brings the same weights.
        weights: initial values, one flat tensor for each layer.
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
        self.flat = torch.cat(list(weights))
        self.flat.grad = torch.zeros_like(self.flat)
        self.buffer = self.flat.grad.numpy()
        lengths = [len(weight) for weight in weights]
        self.layers, self.grads = list(self.flat.split(lengths)), list(self.flat.grad.split(lengths))
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

    def new_state(self) -> Tensors:
        """Zeros for each layer."""
        return [torch.zeros_like(layer) for layer in self.layers]

    def new_scratch(self) -> Tensors:
        """For each layer, but all in the same memory."""
        scratch = torch.empty(max(len(layer) for layer in self.layers))
        return [scratch[: len(layer)] for layer in self.layers]


class DisplacedRival(Rival):
    """A rival that then displaces each worker by its own gradient, which must survive: the sum is a copy of it."""

    def __init__(self, comm: MPI.Comm, *args: Any, inner_lr: float, **options: Any) -> None:
        super().__init__(comm, *args, **options)
        self.points = [self.flat.clone() for _ in self.own]
        self.rate = inner_lr * comm.size * len(self.own)

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        super().prepare()
        super().step()
        for g, x in zip(self.own, self.points, strict=True):
            torch.sub(self.flat, g, alpha=self.rate, out=x)


def make_rival(*args: Any, extrapolation: str = "none", **options: Any) -> Rival:
    """The rival of an engine with these options."""
    options.pop("gain", None)
    return {"none": Rival, "local": DisplacedRival}[extrapolation](*args, **options)


def has_rival(rule: str) -> bool:
    """Whether this rule is written here."""
    return rule in RULES


# --- rules ---


def sgd(rival: Rival, lr: float, momentum: float = 0.0) -> list[Stage]:
    return [rival.reduce, torch.optim.SGD([rival.flat], lr=lr, momentum=momentum, fused=True).step]


def adam(rival: Rival, lr: float) -> list[Stage]:
    return [rival.reduce, torch.optim.Adam([rival.flat], lr=lr, fused=True).step]


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
    "adam": adam,
    "lars": lars,
    "lamb": lamb,
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
