"""Work outside of torch's modes: inference, whose tensors can never be trained, and compilation."""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["keep_from_dynamo", "outside_inference"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function make ordinary tensors where its caller is in `torch.inference_mode()`."""

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        records = torch.is_grad_enabled()  # leaving inference mode would switch it on
        with torch.inference_mode(False), torch.set_grad_enabled(records):
            return method(*args, **kwargs)

    return call


@cache
def keep_from_dynamo() -> None:
    """Have torch.compile leave this package's functions as they are.

    They talk to other ranks and look at addresses, which cannot be traced; hooks among them run in whatever a user
    compiles. torch loads the compiler's front end when it makes its first optimizer.
    """
    rules = getattr(sys.modules.get("torch._dynamo"), "trace_rules", None)
    if (skip := getattr(rules, "add", None)) is not None:
        skip(__package__)
