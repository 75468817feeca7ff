"""torch's hooks around `optimizer.step()`, at no cost where there are none."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.optim import optimizer as torchs

__all__ = ["hooked_as_torchs", "with_torchs_hooks"]

Step = TypeVar("Step", bound=Callable[..., Any])

_profiler_runs: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)

# torch has no public list of the hooks for all optimizers; without these names it runs them by itself.
_FOR_ALL = [getattr(torchs, f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post")]


def hooked_as_torchs(step: Step) -> Step:
    """A step without gradients that runs torch's hooks, that its profiler sees, and whose failure all ranks hear of.

    torch wraps the step of every optimizer in hooks and in a profiler's label, and that takes a good part of a
    small step's time. Here it happens only if a hook is registered or a profiler runs.
    """

    @functools.wraps(step)
    def without_gradients(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            return step(self, *args, **kwargs)
        finally:
            torch.set_grad_enabled(before)

    torchs_way = torch.optim.Optimizer.profile_hook_step(without_gradients)

    @functools.wraps(step)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch may have wrapped that of a subclass by itself.
        own = not getattr(type(self).step, "runs_hooks", False)
        way = torchs_way if own and (_is_watched(self) or _profiler_runs()) else without_gradients
        self._calls += 1
        begun = self._begun
        try:
            return way(self, *args, **kwargs)
        except Exception as error:
            if self._begun == begun:  # in a hook, a closure or the arguments: no other rank has heard of it
                self._tell_all(error)
            raise

    hooked.hooked = not any(hooks is None for hooks in _FOR_ALL)  # type: ignore[attr-defined]
    return cast(Step, hooked)


def with_torchs_hooks(step: Step) -> Step:
    """What torch makes of the step of a class of the user's own, and the failures of its hooks told to all ranks."""
    torchs_way = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls
        try:
            return torchs_way(self, *args, **kwargs)
        except Exception as error:
            if self._calls == calls:  # else the library's own step has told what there was to tell
                self._tell_all(error)
            raise

    told.runs_hooks = True  # type: ignore[attr-defined]
    return cast(Step, told)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *_FOR_ALL)
    return any(hooks)
