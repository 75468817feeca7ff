"""The work that every contestant is given, and the float64 reference that judges what they made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

LR = 1e-3
MOMENTUM = 0.9
BETAS = (0.9, 0.999)
EPS = 1e-3  # large, so that a mean gradient whose sign is a matter of rounding moves a weight by little
SLOTS = {"sgd": 1, "adam": 2}  # the rules, and how many numbers each keeps of a weight
GAMMA = 0.25  # the extrapolation's step: large, so that a wrong displacement shows even in 16 bits


@dataclass(frozen=True)
class Problem:
    """One flat weight, the same on every rank, and one constant gradient for each of the K workers.

    Rank r drives the workers r * workers ... (r + 1) * workers - 1.
    """

    count: int
    dtype: torch.dtype
    rank: int
    ranks: int
    workers: int
    displaced: bool = True
    rule: str = "sgd"

    @property
    def slots(self) -> int:
        """The rule's arrays: the momentum, or two moments."""
        return SLOTS[self.rule]

    @property
    def gamma(self) -> float:
        """The extrapolation's step; 0 without one."""
        return GAMMA if self.displaced else 0.0

    @property
    def all_workers(self) -> int:
        return self.ranks * self.workers

    @property
    def master(self) -> torch.dtype:
        """The type of master weights and momentum."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def gradient_bytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def floor_bytes(self) -> int:
        """What a step must move: every g read, every x written, w and the rule's arrays read and written."""
        own = 2 * (1 + self.slots) * self.master.itemsize
        return self.count * (2 * self.all_workers * self.dtype.itemsize + own)

    @cached_property
    def weights(self) -> torch.Tensor:
        return self._uniform(seed=0)

    @cached_property
    def grads(self) -> list[torch.Tensor]:
        first = self.rank * self.workers
        return [self.gradient(k) for k in range(first, first + self.workers)]

    def gradient(self, k: int) -> torch.Tensor:
        return self._uniform(seed=1 + k)

    @cached_property
    def mean_gradient(self) -> np.ndarray:
        total = np.zeros(self.count)
        for k in range(self.all_workers):
            total += in_double(self.gradient(k))
        return total / self.all_workers

    def reference(self, steps: int) -> np.ndarray:
        """The master weights after `steps` steps, in float64."""
        g = self.mean_gradient
        direction = g / (np.abs(g) + EPS) if self.rule == "adam" else g
        return in_double(self.weights) - self.drift(steps) * direction

    def drift(self, steps: int) -> float:
        """How far a weight moves at most: Adam takes whole steps where gradients are constant."""
        return steps * LR if self.rule == "adam" else drift(steps)

    def _uniform(self, seed: int) -> torch.Tensor:
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        numbers = np.random.default_rng(seed).random(self.count, dtype=kind)
        return torch.from_numpy(2 * numbers - 1).to(self.dtype)


def in_double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def drift(steps: int) -> float:
    """How far SGD with momentum has moved a weight whose gradient was 1 at every step."""
    buffer = moved = 0.0
    for _ in range(steps):
        buffer = MOMENTUM * buffer + 1.0
        moved += LR * buffer
    return moved


def count_wrong(problem: Problem, steps: int, master: torch.Tensor, points: Iterable[torch.Tensor]) -> int:
    """Elements of this rank's w and x_k that lie further from the reference than rounding explains.

    No number exceeds 1 + drift + gamma. A step rounds the weight once, and its other roundings together
    weigh less, so `steps` steps stay within steps * eps of that bound; four more cover start and end.
    The working weights are rounded once to their own type. Whoever sums 16-bit gradients in 16 bits rounds
    the mean up to K times, and the weight has taken `drift` times the mean.
    """
    bound = 1 + problem.drift(steps) + GAMMA
    eps, eps_master = torch.finfo(problem.dtype).eps, torch.finfo(problem.master).eps
    allowed = (steps + 4) * eps_master * bound
    if problem.dtype != problem.master:
        allowed += problem.all_workers * eps * drift(steps)
    reference = problem.reference(steps)
    wrong = count_beyond(master, reference, allowed)
    for point, g in zip(points, problem.grads, strict=True):
        wrong += count_beyond(point, reference - problem.gamma * in_double(g), allowed + eps * bound)
    return wrong


def count_beyond(found: torch.Tensor, expected: np.ndarray, allowed: float) -> int:
    """A NaN counts as wrong."""
    within = np.abs(in_double(found) - expected) <= allowed
    return within.size - int(np.count_nonzero(within))
