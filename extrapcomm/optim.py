"""torch optimizers whose step is one collective."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import numpy as np
import torch
from torch.autograd.graph import increment_version

from . import _core
from ._version import __version__
from .arrays import form_of, look_at
from .errors import UsageError
from .hyper import InnerRate, Rule
from .world import World

__all__ = ["SGD", "Adam", "AdamW", "ExtrapSGD", "FusedOptimizer"]

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class FusedOptimizer(torch.optim.Optimizer):
    """What all optimizers here share: parameters live in shared memory and `step` is the engine's.

    At construction the parameters get rank 0's values and move into shared memory, one piece of it for each worker;
    the model keeps its tensors. Between steps each worker's weights are displaced if there is an extrapolation; the
    master weights, the same for all, are seen within `master_weights()`.

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
        self.world = World() if world is None else world
        self._built = self._closed = self._showing = False
        error: Exception | None = None
        try:
            self._rule = Rule(self.RULE, extrapolation)
            super().__init__(params, defaults | {"inner_lr": inner_lr})
            layers, groups = self._describe()
        except Exception as caught:
            error = caught
        self.world.agree(error)
        self._core = _core.Engine(
            self.world.team, layers, groups, self.RULE, extrapolation, tile, __version__
        )
        self._built = True
        self._settled = [(flags, bool(group.get("momentum"))) for (flags, _), group in self._by_group(groups)]
        self._params: list[torch.Tensor] = [p for group in self.param_groups for p in group["params"]]
        workers, layer_range = range(self.world.workers), range(len(self._params))
        self._weights = [[look_at(self._core.weights(v, i), "torch") for i in layer_range] for v in workers]
        self._grads = [[look_at(self._core.gradients(v, i), "torch") for i in layer_range] for v in workers]
        self._strides = [weights.stride() for weights in self._weights[0]]
        self._present = np.zeros((self.world.workers, len(self._params)), dtype=np.uint8)
        self._bound = 0
        for mine, param in zip(self._weights[0], self._params, strict=True):
            mine.copy_(param.detach())
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
        if self._closed:
            raise UsageError("this optimizer is closed")
        try:
            table = self._checked_table()
            self._collect()
        except UsageError as error:
            self._core.complain(str(error))
            raise
        self._core.step(table, self._present)
        increment_version(self._params)
        return loss

    def _checked_table(self) -> Any:
        if self._showing:
            raise UsageError("step() inside master_weights(): leave the context first")
        for group, (flags, slots) in zip(self.param_groups, self._settled, strict=True):
            self._rule.check_fixed(group, flags, slots)
        return self._rule.table(self.param_groups, self.world.K)

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
        self._collect()
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
            self._collect()
            self._bound = v
            self._point_model_at(v)
            self._point_gradients_at(v)

    def _point_model_at(self, v: int) -> None:
        for param, weights in zip(self._params, self._weights[v], strict=True):
            param.data = weights

    def _point_gradients_at(self, v: int) -> None:
        for param, grad, here in zip(self._params, self._grads[v], self._present[v], strict=True):
            param.grad = grad if here else None

    # -- The master weights --------------------------------------------------------------------------------------

    @contextmanager
    def master_weights(self) -> Iterator[None]:
        """Within the context the model holds the master weights, the same on all ranks: evaluate and save here.

        Afterwards it holds what it held before, bit for bit. Not collective: one rank may evaluate while the others
        wait at the next step.
        """
        if self._showing or self._closed:
            raise UsageError("master_weights() is already open, or the optimizer is closed")
        self._core.show_master(self._bound)
        self._showing = True
        increment_version(self._params)
        try:
            yield
        finally:
            self._showing = False
            self._core.hide_master(self._bound)
            increment_version(self._params)

    def close(self) -> None:
        """Leave the master weights in the model and end this rank's part. Idempotent, not collective."""
        if not self._closed:
            self._closed = True
            self._switch(0)
            self._core.close()
            increment_version(self._params)

    # -- What torch expects of an optimizer ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Possible only before the engine is built, that is: give all groups to the constructor."""
        if self._built:
            raise UsageError("groups cannot be added to a running engine; give all groups to the constructor")
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("an extrapcomm optimizer cannot be copied or pickled; make one in each rank")

    def __getstate__(self) -> Any:
        self.__reduce_ex__(0)

    def _describe(self) -> tuple[list[Any], list[Any]]:
        """The engine's layers and groups."""
        layers, groups = [], []
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                form = form_of(param, f"parameter {name!r}")
                layers.append((name, form.dtype, form.shape, form.strides, g))
            numbers = self._rule.numbers(group, self.world.K)[:-1]
            groups.append((self._rule.flag_bits(group), numbers))
        return layers, groups

    def _by_group(self, groups: list[Any]) -> Iterable[tuple[Any, dict[str, Any]]]:
        return zip(groups, self.param_groups, strict=True)


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, fused with the reduction over all workers.

    The same update as torch.optim.SGD on the mean gradient; and with extrapolation each worker's next gradient is
    taken at a displaced point.

    Args:
        params: parameters, or dicts of them with their own hyper-parameters, as for any torch optimizer.
        lr: learning rate.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: coefficient of the decay, added to the gradient unless decoupled.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        decoupled_weight_decay: shrink the weights themselves by lr * weight_decay.
        extrapolation: "none", "local" (each worker's own last gradient) or "global" (the last mean gradient).
        inner_lr: inner learning rate of the extrapolation: a number, "lr", "lr/K", or a function of lr. The point
            published at the end of a step uses that step's lr.
        world: a World; one over MPI.COMM_WORLD by default.
        tile: elements that go through all stages before the next ones; results do not depend on it.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.

    Example:
        >>> import torch, extrapcomm as xc
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = xc.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> opt.close()
    """

    RULE = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        extrapolation: str = "none",
        inner_lr: InnerRate = "lr/K",
        world: World | None = None,
        tile: int = 512,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extrapolation, inner_lr, world, tile)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer here; checks what Nesterov momentum needs."""
        group = self.defaults | param_group
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise UsageError("Nesterov momentum requires a momentum and zero dampening")
        super().add_param_group(param_group)


class ExtrapSGD(SGD):
    """EXTRAP-SGD: `SGD` whose workers extrapolate with their own last gradient by default.

    Source: Extrapolation for Large-batch Training in Deep Learning (ICML 2020).
    """

    def __init__(self, params: Params, *args: Any, extrapolation: str = "local", **kwargs: Any) -> None:
        super().__init__(params, *args, extrapolation=extrapolation, **kwargs)


class Adam(FusedOptimizer):
    """Adam, fused with the reduction over all workers; the same update as torch.optim.Adam on the mean gradient.

    Args:
        params: parameters, or dicts of them with their own hyper-parameters.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: coefficient of the decay, added to the gradient unless decoupled.
        decoupled_weight_decay: shrink the weights themselves by lr * weight_decay (AdamW).
        extrapolation: only "none"; `inner_lr` has no effect then.
        inner_lr: see `SGD`.
        world: a World; one over MPI.COMM_WORLD by default.
        tile: see `SGD`.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks' models or options differ.
    """

    RULE = "adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        extrapolation: str = "none",
        inner_lr: InnerRate = "lr/K",
        world: World | None = None,
        tile: int = 512,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extrapolation, inner_lr, world, tile)


class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("decoupled_weight_decay", True)
        super().__init__(params, lr, betas, eps, weight_decay, **kwargs)
