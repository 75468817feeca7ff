"""Work outside of torch's inference mode, whose tensors can never be trained."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["outside_inference"]

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
