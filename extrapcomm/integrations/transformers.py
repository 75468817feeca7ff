"""transformers' Trainer: Accelerate's adapter, and rank 0 alone saves what all share."""

from typing import Any

from ..errors import CommError, describe
from .accelerate import adapt_accelerator
from .clipping import unwrapped

__all__ = ["adapt_trainer"]


def adapt_trainer(trainer: Any) -> Any:
    """Let a `transformers.Trainer` train with the fused step; call it once the trainer is made.

    `TrainingArguments(max_grad_norm=...)` then bounds the mean gradient of all workers, whose norm is logged as
    `grad_norm`. Evaluation and prediction see the master weights. Rank 0 alone saves, logs and shows progress;
    `resume_from_checkpoint`, on all ranks, restores weights and the optimizer's state. Give each rank its own part of
    the training data, of the same length, and all ranks the same data for evaluation.

    Args:
        trainer: a Trainer, or of a subclass, made with `optimizers=(opt, scheduler or None)`.

    Returns:
        The trainer.

    Raises:
        UsageError: as `adapt_accelerator`.
    """
    optimizer = unwrapped(trainer.optimizer)
    trainer.optimizer = adapt_accelerator(trainer.accelerator, optimizer)
    optimizer.attach(trainer.model)
    trainer.state.is_world_process_zero = trainer.state.is_local_process_zero = optimizer.world.rank == 0
    _evaluate_at_master_weights(trainer, optimizer)
    _save_on_first_rank(trainer, optimizer)
    _adopt_best_model(trainer, optimizer)
    return trainer


def _evaluate_at_master_weights(trainer: Any, optimizer: Any) -> None:
    loop = trainer.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        if (
            optimizer.closed or optimizer.adoption_pending
        ):  # the model holds them, or those that it has just loaded
            return loop(*args, **kwargs)
        with optimizer.master_weights():
            return loop(*args, **kwargs)

    trainer.evaluation_loop = evaluation_loop


def _save_on_first_rank(trainer: Any, optimizer: Any) -> None:
    """The others give it their part of the state, and wait, so that all find the best checkpoint at the end."""
    save, world = trainer._save_checkpoint, optimizer.world

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        error = None
        with optimizer.collected_state(only_rank=0):
            if world.rank == 0:
                try:
                    save(*args, **kwargs)
                except Exception as caught:
                    error = caught
        told = world.comm.bcast((trainer.state.best_model_checkpoint, error and describe(error)))
        if error:
            raise error
        trainer.state.best_model_checkpoint, trouble = told
        if trouble:
            raise CommError(f"rank 0 could not save a checkpoint: {trouble}")

    trainer._save_checkpoint = save_checkpoint


def _adopt_best_model(trainer: Any, optimizer: Any) -> None:
    """No step follows that would adopt it."""
    load = trainer._load_best_model

    def load_best_model() -> None:
        load()
        optimizer.adopt()

    trainer._load_best_model = load_best_model
