"""What all torch optimizers here share: weights in shared memory, and a step that is the engine's."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import numpy as np
import torch
from torch.autograd import graph

from . import _core, checkpoint, hooks
from ._version import __version__
from .arrays import copy_into, form_of, look_at
from .errors import UsageError, describe
from .hyper import InnerRate, Rule, check_tile
from .world import World, log

__all__ = ["FusedOptimizer", "Params"]

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


def bump_versions(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that these tensors were written."""
    graph.increment_version(tensors)


try:
    bump_versions([torch.zeros(0)])
except Exception:  # torch 2.4 takes one tensor at a time

    def bump_versions(tensors: list[torch.Tensor]) -> None:
        """Tell autograd that these tensors were written."""
        for tensor in tensors:
            graph.increment_version(tensor)


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer on an engine.

    At construction the parameters get rank 0's values and move into shared memory, one piece of it for each worker;
    the model keeps its tensors. Between steps each worker's weights are displaced if there is an extrapolation; the
    master weights, the same for all, are seen within `master_weights()`. The engine computes the weights from the
    master weights, so what others write into a parameter would be lost at the next step: that is an error, unless
    `adopt()` is called.

    Attributes:
        world: the ranks and workers that train together.
    """

    RULE = ""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        extrapolation: str,
        inner_lr: InnerRate,
        world: World | None,
        tile: int,
    ) -> None:
        if not (world is None or isinstance(world, World)):
            raise UsageError(f"world must be a World, not {world!r}")
        self._owns_world = world is None
        self.world = World() if world is None else world
        self._built = self._closed = self._showing = self._to_adopt = self._warned = False
        self._tile = tile
        error: Exception | None = None
        try:
            self._rule = Rule(self.RULE, extrapolation)
            super().__init__(params, defaults | {"inner_lr": inner_lr})
            layers, groups = self._describe()
            check_tile(tile)
        except Exception as caught:
            error = caught
        self.world.agree(error, type(self).__name__)
        self._build(layers, groups)

    def _build(self, layers: list[Any], groups: list[Any]) -> None:
        """Collective: an engine for the present groups, with rank 0's weights, and the model in its memory."""
        self._core = _core.Engine(
            self.world.team, layers, groups, self.RULE, self._rule.extrapolation, self._tile, __version__
        )
        self._built = True
        self._settled = [
            (flags, bool(group.get("momentum")))
            for (flags, _), group in zip(groups, self.param_groups, strict=True)
        ]
        self._names = [name for name, *_ in layers]
        self._params: list[torch.Tensor] = [p for group in self.param_groups for p in group["params"]]
        workers, each = range(self.world.workers), range(len(self._params))
        self._weights = [[look_at(self._core.weights(v, i), "torch") for i in each] for v in workers]
        self._grads = [[look_at(self._core.gradients(v, i), "torch") for i in each] for v in workers]
        self._strides = [weights.stride() for weights in self._weights[0]]
        self._present = np.zeros((self.world.workers, len(self._params)), dtype=np.uint8)
        self._bound = 0
        for i, param in enumerate(self._params):
            copy_into(self._core.weights(0, i), param)
        self._core.adopt(0)
        self._point_model_at(0)

    # -- The step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Collective: the mean of all workers' gradients, the update, and every worker's next weights.

        A parameter whose gradient is None on all workers is left alone; None on some counts as zeros there.

        Args:
            closure: called first, with gradients enabled, to evaluate the model and return the loss.

        Returns:
            What the closure returned.

        Raises:
            UsageError, MismatchError: on every rank, with no weight touched.
            PeerError: if a rank died, left or does not come; the optimizer takes no more steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_open()
        if self._to_adopt:
            self.adopt()
        try:
            table = self._checked_table()
            self._collect()
        except Exception as error:
            self._core.complain(describe(error))
            raise
        if self.world.workers > 1:
            self._warn_of_idle_workers()
        self._core.step(table, self._present)
        self._mark_written()
        return loss

    def _checked_table(self) -> Any:
        if self._showing:
            raise UsageError("step() inside master_weights(): leave the context first")
        self._require_own_weights()
        for group, (flags, slots) in zip(self.param_groups, self._settled, strict=True):
            self._rule.check_fixed(group, flags, slots)
        return self._rule.table(self.param_groups, self.world.K)

    def _warn_of_idle_workers(self) -> None:
        idle = ~self._present.any(axis=1)
        if idle.any() and not idle.all() and not self._warned:
            self._warned = True
            log.warning(
                "%d of this rank's %d workers have no gradient at all and count as zeros in the mean: "
                "run forward and backward once in `with opt.worker(v)` for every v",
                idle.sum(),
                self.world.workers,
            )

    def _collect(self) -> None:
        """Bring the gradients that autograd made for the bound worker into its shared memory, in one batch."""
        grads = [param.grad for param in self._params]
        try:
            if [None if grad is None else grad.stride() for grad in grads] != self._strides:
                grads = [None if g is None else self._laid_out(i, g) for i, g in enumerate(grads)]
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        except RuntimeError as error:  # sparse tensors have neither strides nor one address
            raise UsageError("a gradient is sparse; use dense ones (sparse=False in Embedding)") from error
        self._core.gather(self._bound, addresses, self._present[self._bound])

    def _laid_out(self, i: int, grad: torch.Tensor) -> torch.Tensor:
        """The gradient with its parameter's strides: itself, or a copy in shared memory."""
        mine = self._grads[self._bound][i]
        return grad if grad.stride() == mine.stride() else mine.copy_(grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all workers of this rank.

        Args:
            set_to_none: drop them, the default; otherwise existing ones become zeros in shared memory, and the next
                backward pass adds to them there.
        """
        if set_to_none:
            self._present[:] = 0
            for param in self._params:
                param.grad = None
            return
        self._present[self._bound] = [param.grad is not None for param in self._params]
        for present, grads in zip(self._present, self._grads, strict=True):
            for here, grad in zip(present, grads, strict=True):
                if here:
                    grad.zero_()
        self._point_gradients_at(self._bound)

    @property
    def last_step_seconds(self) -> float:
        """How long the last step took inside the compiled part, in seconds, waiting included."""
        return self._core.last_step_seconds

    # -- Workers -------------------------------------------------------------------------------------------------

    @contextmanager
    def worker(self, v: int) -> Iterator[None]:
        """Within the context the model has the weights and gradients of this rank's worker v.

        Args:
            v: 0 <= v < world.workers.

        Raises:
            UsageError: for another v.
        """
        if not (isinstance(v, int) and 0 <= v < self.world.workers):
            raise UsageError(f"there is no worker {v!r}; this rank drives {self.world.workers}, from 0")
        before = self._bound
        self._switch(v)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, v: int) -> None:
        if self._showing:
            raise UsageError("worker() inside master_weights(): leave the context first")
        if v != self._bound:
            self._require_own_weights()
            self._collect()
            self._bound = v
            self._point_model_at(v)
            self._point_gradients_at(v)

    def _point_model_at(self, v: int) -> None:
        for param, weights in zip(self._params, self._weights[v], strict=True):
            param.data = weights
        self._record()

    def _point_gradients_at(self, v: int) -> None:
        for param, grad, here in zip(self._params, self._grads[v], self._present[v], strict=True):
            param.grad = grad if here else None

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def _record(self) -> None:
        """Remember how the parameters look now, to notice what others write into them."""
        self._versions = [param._version for param in self._params]
        self._addresses = [param.data_ptr() for param in self._params]

    def _mark_written(self) -> None:
        """Tell autograd that the weights have changed, so that backward through an old graph raises."""
        bump_versions(self._params)
        self._versions = [param._version for param in self._params]

    def _require_own_weights(self) -> None:
        if self._to_adopt:
            return
        versions = [param._version for param in self._params]
        addresses = [param.data_ptr() for param in self._params]
        if versions == self._versions and addresses == self._addresses:
            return
        seen = zip(versions, self._versions, addresses, self._addresses, strict=True)
        changed = next(i for i, (v, own_v, a, own_a) in enumerate(seen) if v != own_v or a != own_a)
        raise UsageError(
            f"parameter {self._names[changed]!r} was written or replaced outside the optimizer, and the next step "
            "would lose that: call opt.adopt() after changing weights, or change them in master_weights(write=True)"
        )

    def adopt(self) -> None:
        """Collective: take rank 0's present weights as the master weights of all, undisplaced; keep the rule's state.

        Raises:
            UsageError: on every rank, if one is inside `worker()` or `master_weights()`, or if a parameter was
                replaced by one of another shape or type.
        """
        self._require_open()
        try:
            if self._showing or self._bound != 0:
                raise UsageError("adopt() inside master_weights() or worker(): leave the context first")
            for i, (param, mine) in enumerate(zip(self._params, self._weights[0], strict=True)):
                if param.data_ptr() != mine.data_ptr():
                    self._take_over(i, param, mine)
        except Exception as error:
            self._core.complain(describe(error))
            raise
        self._adopt()

    def _adopt(self) -> None:
        self._core.adopt(0)
        self._to_adopt = False
        self._mark_written()
        self._record()

    def _take_over(self, i: int, param: torch.Tensor, mine: torch.Tensor) -> None:
        if (
            param.shape != mine.shape
            or form_of(param, self._names[i]).dtype != self._core.weights(0, i).dtype
        ):
            raise UsageError(f"parameter {self._names[i]!r} was replaced by one of another shape or type")
        mine.copy_(param.detach())
        param.data = mine

    def attach(self, model: torch.nn.Module) -> None:
        """Let the model save and load the master weights.

        Afterwards `model.state_dict()` gives the master weights, whatever the worker's displacement, so the usual
        `torch.save(model.state_dict(), ...)` on rank 0 saves the right model; and after `model.load_state_dict()`,
        which every rank must call, the next step adopts what was loaded.

        Args:
            model: any module that contains parameters of this optimizer.

        Raises:
            UsageError: if it contains none.
        """
        hooks.attach(self, model, dict(zip(map(id, self._params), range(len(self._params)), strict=True)))

    def master(self, i: int) -> torch.Tensor:
        """A copy of the i-th parameter's master weights, float32 (float64 for float64). Not collective."""
        return checkpoint.strided(self._core.read(i, 0), self._params[i])

    @contextmanager
    def master_weights(self, write: bool = False) -> Iterator[None]:
        """Within the context the model holds the master weights, the same on all ranks: evaluate and save here.

        Afterwards it holds what it held before, bit for bit. Not collective: one rank may evaluate while the others
        wait at the next step.

        Args:
            write: collective then: on leaving, rank 0's weights become the master weights of all.
        """
        self._require_open()
        if self._showing:
            raise UsageError("master_weights() is already open")
        self._core.show_master(self._bound)
        self._showing = True
        self._mark_written()
        try:
            yield
        except BaseException as error:
            self._hide_master()
            if write and not self._closed:
                self._core.complain(f"master_weights(write=True) was left by {type(error).__name__}: {error}")
            raise
        if write and not self._closed:
            self._core.keep_master(self._bound)
            self._showing = False
            self._adopt()
        else:
            self._hide_master()

    def _hide_master(self) -> None:
        if not self._showing:
            return  # closed meanwhile
        self._showing = False
        self._core.hide_master(self._bound)
        self._mark_written()

    def sync_buffers(self, model: torch.nn.Module, how: str = "broadcast") -> None:
        """Collective: make the model's buffers (BatchNorm's running statistics) alike on all ranks.

        Args:
            model: whose buffers.
            how: "broadcast" takes rank 0's; "average" takes the mean of floating-point ones, rank 0's of the others.

        Raises:
            UsageError: for another `how`.
        """
        hooks.sync_buffers(self.world, model, how)

    # -- What torch expects of an optimizer ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's dict of the same rule, with the master weights as `state[i]["master"]`.

        torch.optim's optimizer of the same name loads it. Not collective. The displacements are not in it: after
        loading, every worker starts from the master weights. An `inner_lr` that is a function is left out.
        """
        packed = super().state_dict()
        return checkpoint.fill(packed, self._core, self._rule, self._params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: take hyper-parameters, state, and master weights if they are there, from a `state_dict`.

        Accepts torch.optim's of the same rule, too: that has no master weights, so the model's are adopted at the
        next step if they were changed.

        Raises:
            UsageError: on every rank, if it does not fit.
            MismatchError: on every rank, if the ranks bring different ones.
        """
        self._require_open()
        try:
            if self._showing:
                raise UsageError("load_state_dict() inside master_weights(): leave the context first")
            groups = checkpoint.groups_of(state_dict, self.param_groups)
            for group, (flags, slots) in zip(groups, self._settled, strict=True):
                self._rule.check_fixed(group, flags, slots)
            layers, digest = checkpoint.layers_of(state_dict, self._core, self._rule, self._params)
        except Exception as error:
            self._core.complain(describe(error))
            raise
        has_weights = all(weights is not None for weights, *_ in layers)
        foreign = not has_weights and self._to_adopt
        self._core.load(layers, digest)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._mark_written()
        self._to_adopt = foreign

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Collective once the optimizer exists: train these parameters, too. The others keep weights and state.

        Args:
            param_group: `params` and, if they differ from the defaults, hyper-parameters.
        """
        if not self._built:
            super().add_param_group(param_group)
            return
        self._require_open()
        self._switch(0)
        error: Exception | None = None
        saved = checkpoint.snapshot(self._core, len(self._params))
        try:
            super().add_param_group(param_group)
            layers, groups = self._describe()
        except Exception as caught:
            error = caught
        self.world.agree(error, "parameter group")
        self._core.close()
        self._build(layers, groups)
        checkpoint.restore(self._core, saved, len(self._params))
        self._mark_written()

    def close(self) -> None:
        """Leave the master weights in the model and end this rank's part. Idempotent, not collective."""
        if not self._closed:
            if self._showing:
                self._hide_master()
            if self._bound != 0:
                self._bound = 0
                self._point_model_at(0)
            self._closed = True
            self._core.close()
            bump_versions(self._params)
            if self._owns_world:
                self.world.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this optimizer is closed")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("an extrapcomm optimizer cannot be copied or pickled; make one in each rank")

    def __getstate__(self) -> Any:
        self.__reduce_ex__(0)

    def _describe(self) -> tuple[list[Any], list[Any]]:
        """The engine's layers and groups."""
        layers, groups, seen = [], [], set()
        for g, group in enumerate(self.param_groups):
            if switches := [s for s in checkpoint.FOREIGN_SWITCHES if group.get(s)]:
                raise UsageError(f"extrapcomm's optimizers do not have {', '.join(switches)}")
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                if id(param) in seen:
                    raise UsageError(f"parameter {name!r} is given twice")
                seen.add(id(param))
                form = form_of(param, f"parameter {name!r}")
                layers.append((name, form.dtype, form.shape, form.strides, g))
            numbers = self._rule.numbers(group, self.world.K)[:-1]
            groups.append((self._rule.flag_bits(group), numbers))
        return layers, groups
