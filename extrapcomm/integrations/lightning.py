"""Lightning: a strategy of one device per rank, whose optimizers bring the ranks together."""

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only

from ..errors import UsageError
from ..fused import FusedOptimizer
from ..world import World
from .clipping import Clipping, refuse_clipping_by_value, require_one_worker, unwrapped

__all__ = ["FusedStrategy"]


class FusedStrategy(SingleDeviceStrategy):
    """Trains on every rank of a World by itself; only the optimizer's fused step meets the others.

    `Trainer(gradient_clip_val=...)` bounds the mean gradient of all workers. Validation, test and prediction see the
    master weights. Rank 0 alone logs and saves, and what it saves are the master weights. When training ends, the
    optimizers are closed and the model holds the master weights. Lightning does not shard the data: give each rank
    its own part, of the same length, for example by DistributedSampler(data, world.size, world.rank).

    Args:
        world: of one worker per rank; give it to the optimizers, too. Start the ranks by mpirun.
        device: where this rank trains.

    Raises:
        UsageError: for a world of several workers per rank.

    Example (not run here):
        trainer = lightning.Trainer(strategy=FusedStrategy(world), accelerator="cpu", devices=1)
    """

    def __init__(self, world: World, device: str | torch.device = "cpu", **kwargs: Any) -> None:
        super().__init__(device, **kwargs)
        if world.workers != 1:
            raise UsageError(f"FusedStrategy drives one worker per rank, and this World has {world.workers}")
        self.world = world
        self.global_rank = self.local_rank = rank_zero_only.rank = world.rank
        self._clippings: dict[int, Clipping] = {}
        self._shown: list[Any] = []
        self._kept_in_place: list[Any] = []

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank logs and saves."""
        return self.world.rank == 0

    def barrier(self, *_: Any, **__: Any) -> None:
        """Collective: wait for all ranks."""
        self.world.comm.Barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Collective: rank src's object."""
        return self.world.comm.bcast(obj, root=src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Collective: whether all ranks, or any, decided so; they stop together."""
        votes: int = sum(self.world.comm.allgather(bool(decision)))
        return votes == self.world.size if all else votes > 0

    # -- The optimizers ------------------------------------------------------------------------------------------

    def setup_optimizers(self, trainer: Any) -> None:
        """Collective: what the module configures, with its clipping and the module's saving sent to it."""
        super().setup_optimizers(trainer)
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UsageError(
                "Lightning scales the loss for fp16 on each rank by itself: use bf16-mixed or 32-true"
            )
        for optimizer in self.optimizers:
            if not isinstance(optimizer, FusedOptimizer):
                raise UsageError(
                    f"FusedStrategy is for extrapcomm's optimizers, not {type(optimizer).__name__}"
                )
            require_one_worker(optimizer)
            optimizer.attach(self.lightning_module)
            self._clippings[id(optimizer)] = Clipping(optimizer)
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm
        self.precision_plugin.clip_grad_by_value = refuse_clipping_by_value

    # Lightning moves the optimizers' state to its device by reading and assigning every value. Here the state lies
    # where the parameters do, so the optimizers are out of sight while it does that.

    def setup(self, trainer: Any) -> None:
        """Collective: as Lightning's, but the optimizers' state stays where it is."""
        super().setup(trainer)
        self.optimizers = self._kept_in_place

    def setup_precision_plugin(self) -> None:
        """As Lightning's; what follows it in `setup()` moves the optimizers' state."""
        super().setup_precision_plugin()
        self._kept_in_place, self.optimizers = self.optimizers, []

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Collective: give each optimizer its saved state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def _clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        self._clippings[id(unwrapped(optimizer))].by_norm(clip_val)

    def teardown(self) -> None:
        """Leave the master weights in the model."""
        self._hide_master_weights()
        for optimizer in self.optimizers:
            optimizer.close()
        kept, self.optimizers = self.optimizers, []
        super().teardown()
        self.optimizers = kept

    # -- Evaluation at the master weights ------------------------------------------------------------------------

    def _show_master_weights(self) -> None:
        for optimizer in self.optimizers:
            if not optimizer.closed:
                self._shown.append(optimizer.master_weights())
                self._shown[-1].__enter__()

    def _hide_master_weights(self) -> None:
        while self._shown:
            self._shown.pop().__exit__(None, None, None)

    on_validation_start = on_test_start = on_predict_start = _show_master_weights
    on_validation_end = on_test_end = on_predict_end = _hide_master_weights
