"""A step that was recorded with others' work on a GPU, and runs again whenever the recording is replayed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import UsageError

__all__ = ["Captured"]


@dataclass(frozen=True)
class Captured:
    """What a replay has as it was when the step was captured.

    Attributes:
        present: which worker had a gradient of which parameter.
        divisor: what every gradient is divided by, beside the number of workers.
        micro_batches: how many each worker's gradient was the sum of.
        addresses: where the gradients of the bound worker lay; 0 for none.
    """

    present: NDArray[np.uint8]
    divisor: float
    micro_batches: int
    addresses: Sequence[int]

    def require_like(self, micro_batches: int, names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
        """UsageError if the replay would not see the present gradients.

        In a whole iteration that is replayed nothing is announced, and gradients may have been dropped, so one
        micro-batch and no gradient are well.
        """
        if micro_batches not in (1, self.micro_batches):
            raise UsageError(
                f"the captured step divides by {self.micro_batches} micro-batches, and now there are {micro_batches}: "
                "capture a step for each number of them"
            )
        for name, param, address in zip(names, params, self.addresses, strict=True):
            if param.grad is not None and param.grad.data_ptr() != address:
                raise UsageError(
                    f"the gradient of {name!r} is not where the captured step reads it: keep gradients in place with "
                    "zero_grad(set_to_none=False), or capture forward and backward as well"
                )
