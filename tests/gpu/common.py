"""What the rows of `make test-gpu` share: where arrays lie, engines beside those of the CPU, and how a row ends.

A row is a program. It ends with 0 and a last line that gives its figure, or with SKIPPED and a last line that says why.
With XC_DEVICE=host the rows run on the host's own device, which shows that the programs themselves are right.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
from store_world import StoreWorld

import extrapcomm as xc

SKIPPED = 77
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTHS = (5, 1500, 64)  # one shorter than a cell, one over the edge of one

# Each rule that has kernels, with numbers that let all its terms act.
RULES = {
    "plain SGD": {"rule": "sgd", "lr": 0.1},
    "SGD with Nesterov": {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "SGD with dampening": {
        "rule": "sgd",
        "lr": 0.1,
        "momentum": 0.8,
        "dampening": 0.3,
        "decoupled_weight_decay": True,
    },
    "Adam": {"rule": "adam", "lr": 1e-2, "weight_decay": 1e-2},
    "AdamW": {"rule": "adam", "lr": 1e-2, "weight_decay": 1e-1, "decoupled_weight_decay": True},
    "LARS": {"rule": "lars", "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3},
    "LAMB": {"rule": "lamb", "lr": 1e-2, "weight_decay": 1e-2},
}
KINDS = ("none", "local", "global", "anisotropic", "gaussian", "uniform")


def place() -> str:
    return "cpu" if os.environ.get("XC_DEVICE") == "host" else "cuda"


def skip(reason: str) -> NoReturn:
    print(f"skipped: {reason}")
    sys.exit(SKIPPED)


def require_gpu() -> None:
    """Ends the row where there is none."""
    if place() == "cuda" and not torch.cuda.is_available():
        skip("torch sees no GPU")


@contextmanager
def on_the_cpu() -> Iterator[None]:
    before = os.environ.pop("XC_DEVICE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["XC_DEVICE"] = before


class Twins:
    """The same engine on the device and on the CPU, fed with the same gradients."""

    def __init__(
        self,
        workers: int,
        dtype: str,
        *,
        lengths=LENGTHS,
        gain: Callable[[], xc.AdaScale] | None = None,
        **options,
    ) -> None:
        self.random = np.random.default_rng(0)
        self.dtype, self.lengths = DTYPES[dtype], lengths
        self.world = StoreWorld(workers=workers)
        weights = self.values()
        gains = [gain and gain() for _ in range(2)]
        self.device = xc.Engine(self.world, [w.to(place()) for w in weights], gain=gains[0], **options)
        with on_the_cpu():
            self.cpu = xc.Engine(self.world, weights, gain=gains[1], **options)

    def values(self) -> list[torch.Tensor]:
        draws = [self.random.normal(size=n).astype(np.float32) for n in self.lengths]
        return [torch.from_numpy(values).to(self.dtype) for values in draws]

    def step(self, **hyper) -> None:
        self.fill()
        for engine in (self.device, self.cpu):
            engine.step(**hyper)

    def fill(self) -> None:
        """New gradients for both."""
        for there, here in zip(self.device.workers, self.cpu.workers, strict=True):
            for on_device, on_cpu, values in zip(there.grads, here.grads, self.values(), strict=True):
                on_device.copy_(values)
                on_cpu.copy_(values)

    def require_same_bits(self, what: str) -> None:
        for mine, its in zip(self.device.master(), self.cpu.master(), strict=True):
            require(np.array_equal(bits(mine), bits(its)), f"{what}: master weights differ")
        for there, here in zip(self.device.workers, self.cpu.workers, strict=True):
            for mine, its in zip(there.weights, here.weights, strict=True):
                same = torch.equal(mine.cpu().view(integers(mine)), its.view(integers(its)))
                require(same, f"{what}: published weights differ")
        require(self.device.skipped == self.cpu.skipped, f"{what}: one of them skipped")
        require(self.device.grad_norm == self.cpu.grad_norm, f"{what}: norms differ")

    def close(self) -> None:
        self.device.close()
        self.cpu.close()
        self.world.close()


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def integers(tensor: torch.Tensor) -> torch.dtype:
    return torch.int32 if tensor.dtype == torch.float32 else torch.int16


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def refusal(call: Callable[[], object]) -> str:
    """The words of the UsageError that this call ends with."""
    try:
        call()
    except xc.UsageError as error:
        return str(error)
    raise AssertionError("nothing was refused")
