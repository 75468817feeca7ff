"""Adapters for trainers of other libraries: Accelerate, transformers' Trainer and Lightning.

Those trainers clip gradients between backward and step, where each rank has only its own gradient and would clip it
by its own norm. The adapters send the bound to the optimizer, whose step clips the mean gradient of all workers by
the norm of that mean. They also see to it that under mpirun every rank is one process to the trainer, that rank 0
alone saves and prints, and that evaluation sees the master weights. No library is imported before it is needed.
"""

from typing import TYPE_CHECKING, Any

from .accelerate import adapt_accelerator, one_process
from .transformers import adapt_trainer

if TYPE_CHECKING:
    from .lightning import FusedStrategy

__all__ = ["FusedStrategy", "adapt_accelerator", "adapt_trainer", "one_process"]


def __getattr__(name: str) -> Any:
    """Load Lightning only for those who ask for its strategy."""
    if name == "FusedStrategy":
        from .lightning import FusedStrategy

        return FusedStrategy
    raise AttributeError(f"module 'extrapcomm.integrations' has no attribute {name!r}")
