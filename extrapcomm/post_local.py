"""Post-local SGD: fused steps first, then local ones with averaging between them."""

from typing import Any

from .errors import UsageError, describe
from .fused import Params
from .optim import SGD

__all__ = ["PostLocalSGD"]


class PostLocalSGD(SGD):
    """Post-local SGD: `SGD` until `start`, then each worker trains alone and weights are averaged now and then.

    In the local phase every worker applies the rule to its own gradient, weights and momentum, without communication.
    Every `local_steps`-th step ends in one collective that gives all workers the mean of their weights; momentum
    buffers stay each worker's own. The phase begins at the master weights, with the momentum of all. Up to there, and
    only there, `extrapolation` displaces the weights: with "local" this is EXTRAP-SGD followed by local SGD.

    In the local phase the master weights and the state are those of the last average: `master_weights()`,
    `state_dict()` and `close()` know nothing later, unless `average()` was called. The momentum that is saved is the
    mean of the workers', from which a loaded run starts them all. Hyper-parameters are compared at averagings.

    Memory: from the switch on, each worker has its momentum in full, as many bytes as its weights; none without
    momentum.

    Source: Don't Use Large Mini-Batches, Use Local SGD (arXiv:1808.07217), post-local SGD.

    Args:
        params: parameters in float32 or float64, or dicts of them.
        args: as `SGD`.
        local_steps: steps from one averaging to the next, H in the paper. May change between steps, alike on all ranks.
        start: fused steps before the local ones, counted by the updates of the parameter that had most, so that a
            checkpoint knows them.
        kwargs: as `SGD`, but no `overlap`, `max_grad_norm` or `skip_nonfinite`: the last two go by the mean gradient,
            which local steps do not have. `clip_grad_norm_` between backward() and step() clips each worker's own.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.

    Example:
        >>> import torch, extrapcomm as xc
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = xc.PostLocalSGD(model.parameters(), lr=0.1, momentum=0.9, local_steps=16, start=1)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     opt.step()
        >>> opt.average()
        >>> opt.close()
    """

    def __init__(self, params: Params, *args: Any, local_steps: int, start: int, **kwargs: Any) -> None:
        self.local_steps = local_steps
        self.start = start
        super().__init__(params, *args, **kwargs)

    @property
    def local(self) -> bool:
        """Whether the next step is a local one."""
        return self._core.local_steps is not None or self._core.most_updates >= self.start

    def average(self) -> None:
        """Collective: average now, as at the end of training; the next `local_steps` count from here.

        Outside the local phase there is nothing to average.

        Raises:
            UsageError, MismatchError: on every rank, with no weight touched; also if the ranks have taken different
                numbers of local steps.
            PeerError: if a rank died, left or does not come; the optimizer takes no more steps.
        """
        self._require_open()
        if self._to_adopt:
            self._adopt_pending()
        if self._core.local_steps is None:
            return
        try:
            self._require_outside("average()")
            self._binding.require_own_weights(everywhere=True)
        except Exception as error:
            self._core.complain(describe(error))
            raise
        self._core.average()
        self._binding.mark_written()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `SGD`; the local phase averages first, and goes on from the mean of weights and momentum."""
        if self._built:
            self.average()
        super().add_param_group(param_group)

    def _advance(self, table: Any, *options: Any) -> tuple[float | None, bool, Any]:
        if not self.local:
            return super()._advance(table, *options)
        taken = self._core.local_steps
        if taken is None:
            self._core.begin_local()
            self._binding.mark_written()
            taken = 0
        advance = self._core.local_step if taken + 1 < self.local_steps else self._core.averaging_step
        present, _, divisor, *_ = options
        advance(table, present, divisor)
        return None, False, None

    def _warn_of_mistakes(self) -> None:
        self._binding.gradients.forget_rescaling()  # each worker may clip its own gradient
        super()._warn_of_mistakes()

    def _title(self) -> str:
        return f"{super()._title()}(local_steps={self.local_steps}, start={self.start})"

    def _checked_table(self) -> Any:
        self._check_own()
        return super()._checked_table()

    def _describe(self) -> tuple[list[Any], list[Any]]:
        self._check_own()
        layers, groups = super()._describe()
        for name, dtype, *_ in layers:
            if dtype not in ("float32", "float64"):
                raise UsageError(
                    f"parameter {name!r} is {dtype}: a worker alone has no float32 master weights to take local "
                    "steps with; use float32 parameters, and autocast for speed"
                )
        return layers, groups

    def _check_own(self) -> None:
        """Complain about what local steps cannot do."""
        for name, value, least in (("local_steps", self.local_steps, 1), ("start", self.start, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self._overlap:
            raise UsageError("local steps have no sums to send during backward: leave out overlap")
        if self._gain is not None:
            raise UsageError("local steps have no mean gradient that a gain could be measured from")
        if self.max_grad_norm is not None:
            raise UsageError(
                "local steps have no mean gradient for max_grad_norm to clip: clip each worker's own with "
                "torch.nn.utils.clip_grad_norm_ between backward() and step()"
            )
        if self.skip_nonfinite:
            raise UsageError(
                "local steps have no mean gradient that could decide, so there is neither skip_nonfinite nor a "
                "GradScaler for them"
            )
