"""Accelerate: one process to it, one of many ranks to us."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..errors import UsageError
from ..fused import FusedOptimizer
from .clipping import Clipping, refuse_clipping_by_value, require_one_worker, unwrapped

__all__ = ["adapt_accelerator", "one_process"]

# What Accelerate takes for a sign that it should form a process group.
LAUNCHERS = ("LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")


@contextmanager
def one_process() -> Iterator[None]:
    """Within the context Accelerate does not see mpirun's variables: make `Accelerator(cpu=True)` here.

    Without `cpu=True`, or `TrainingArguments(use_cpu=True)`, it does not look at them, and this is not needed. MPI
    must be running by then, which it is once a World exists.

    Example:
        >>> from extrapcomm.integrations import one_process
        >>> with one_process():
        ...     pass  # arguments = TrainingArguments(folder, use_cpu=True, bf16=True)
    """
    hidden = {name: os.environ.pop(name) for name in LAUNCHERS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def adapt_accelerator(accelerator: Any, optimizer: Any) -> Any:
    """Let an `accelerate.Accelerator` train with the fused step; call it before `prepare`.

    From then on `accelerator.clip_grad_norm_(model.parameters(), max_norm)` has the next steps clip the mean gradient
    of all workers, and returns a tensor that holds that gradient's norm once the step has been taken.
    `accelerator.is_main_process` is true on rank 0 alone. Accelerate neither shards the data nor averages anything:
    give each rank its own part, for example by DistributedSampler(data, world.size, world.rank).

    Args:
        accelerator: without fp16; if with `cpu=True`, made within `one_process()`.
        optimizer: an optimizer of this library. Several are adapted one after the other.

    Returns:
        The optimizer as Accelerate prepares it.

    Raises:
        UsageError: for another optimizer, several workers per rank, or an accelerator that runs several processes.
    """
    optimizer = unwrapped(optimizer)
    _check(accelerator, optimizer)
    _number_process(accelerator, optimizer.world.rank)
    _redirect_clipping(accelerator, Clipping(optimizer))
    # With device placement Accelerate would reload the optimizer's weights over those that the model loaded.
    prepared = accelerator.prepare(optimizer, device_placement=[False])
    optimizer.register_step_post_hook(lambda *_: setattr(prepared, "_is_overflow", optimizer.skipped))
    return prepared


def _check(accelerator: Any, optimizer: Any) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise UsageError(f"this adapter is for extrapcomm's optimizers, not {type(optimizer).__name__}")
    require_one_worker(optimizer)
    if accelerator.num_processes != 1:
        raise UsageError(
            f"Accelerate runs {accelerator.num_processes} processes and would average gradients, too: start the script "
            "by mpirun, not by `accelerate launch`, and make what has cpu=True or use_cpu=True in one_process()"
        )
    if accelerator.scaler is not None:
        raise UsageError(
            "Accelerate scales the loss for fp16 on each rank by itself: use bf16 or no mixed precision"
        )


def _number_process(accelerator: Any, rank: int) -> None:
    """Saving and printing depend on the index alone; sharding depends on the number of processes, which stays 1."""
    from accelerate.state import PartialState

    for state in (PartialState(), accelerator.state):
        state.process_index = state.local_process_index = rank
    accelerator.dataloader_config.dispatch_batches = False  # or rank 0 would read for the others


def _redirect_clipping(accelerator: Any, clipping: Clipping) -> None:
    """In front of what clips other optimizers' gradients."""
    norm, value = accelerator.clip_grad_norm_, accelerator.clip_grad_value_

    def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2) -> Any:
        given = _listed(parameters)
        clip = clipping.by_norm if clipping.concerns(given) else partial(norm, given)
        return clip(max_norm, norm_type)

    def clip_grad_value_(parameters: Iterable[torch.Tensor], clip_value: float) -> Any:
        given = _listed(parameters)
        clip = refuse_clipping_by_value if clipping.concerns(given) else partial(value, given)
        return clip(clip_value)

    accelerator.clip_grad_norm_, accelerator.clip_grad_value_ = clip_grad_norm_, clip_grad_value_


def _listed(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
