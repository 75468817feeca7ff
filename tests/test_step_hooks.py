"""torch's hooks around a step and its profiler see a step here as one of torch's own."""

import contextlib
import functools
import importlib

import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")


class Subclass(xc.SGD):
    """A user's own."""

    def step(self, closure=None):
        return super().step(closure)


KINDS = {"SGD": xc.SGD, "a subclass": Subclass}


def made(world, kind="SGD"):
    param = torch.nn.Parameter(torch.ones(4))
    return param, KINDS[kind]([param], lr=0.1, world=world)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("everywhere", [False, True], ids=["its own", "for all optimizers"])
def test_hooks_run_once_around_a_step(world, kind, everywhere):
    seen = []
    made(world)[1].close()  # torch wraps a class when its first optimizer is made
    param, opt = made(world, kind)
    if everywhere:
        module = importlib.import_module("torch.optim.optimizer")
        handles = [
            module.register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
            module.register_optimizer_step_post_hook(lambda *_: seen.append("after")),
        ]
    else:
        handles = [
            opt.register_step_pre_hook(lambda *_: seen.append("before")),
            opt.register_step_post_hook(lambda *_: seen.append("after")),
        ]
    param.grad = torch.ones(4)
    opt.step()
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    opt.step()
    assert seen == ["before", "after"]
    opt.close()


def test_a_hook_changes_the_arguments(world):
    param, opt = made(world)
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 3.0), {}))
    param.grad = torch.ones(4)
    assert opt.step() == 3.0
    opt.close()


def test_the_profiler_names_the_step(world):
    param, opt = made(world)
    param.grad = torch.ones(4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert any(event.key == "Optimizer.step#SGD.step" for event in profile.key_averages())
    opt.close()


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_as_enabled_as_before(world, enabled):
    param, opt = made(world)
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        param.grad = torch.ones(4)
        return torch.tensor(2.0)

    with torch.set_grad_enabled(enabled):
        assert opt.step(closure) == 2.0
        assert torch.is_grad_enabled() is enabled
        opt.param_groups[0]["lr"] = -1.0
        with pytest.raises(xc.UsageError):
            opt.step()
        assert torch.is_grad_enabled() is enabled
    assert modes == [True]
    opt.close()


def test_schedulers_see_the_step(world, recwarn):
    param, opt = made(world)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    param.grad = torch.ones(4)
    opt.step()
    scheduler.step()
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
    opt.close()


def test_hooks_run_where_the_class_was_wrapped(world):
    own, seen = xc.SGD.step, []
    made(world)[1].close()

    class Wrapped(xc.SGD):
        @functools.wraps(own)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    param = torch.nn.Parameter(torch.ones(4))
    opt = Wrapped([param], lr=0.1, world=world)
    opt.register_step_post_hook(lambda *_: seen.append(1))
    param.grad = torch.ones(4)
    opt.step()
    assert seen == [1]
    opt.close()


def raise_in(where, opt, param):
    """A step that fails on this rank before it begins."""

    def fail(*_):
        raise ZeroDivisionError("no step")

    if where == "arguments":
        opt.step(None, None)
    elif where == "closure":
        opt.step(fail)
    else:
        with contextlib.closing(Removed(opt.register_step_pre_hook(fail))):
            opt.step()


class Removed:
    def __init__(self, handle):
        self.close = handle.remove


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["closure", "hook", "arguments"])
def test_a_step_that_fails_on_one_rank_before_it_begins_fails_on_all(world, where, kind):
    """Whoever catches the error goes on, and must not take its next step with the others' last one."""
    made(world, kind)[1].close()
    param, opt = made(world, kind)
    fails = world.rank == world.size - 1
    param.grad = torch.ones(4)
    error = (TypeError if where == "arguments" else ZeroDivisionError) if fails else xc.UsageError
    with pytest.raises(error, match="takes" if where == "arguments" else "no step"):
        raise_in(where, opt, param) if fails else opt.step()
    torch.testing.assert_close(opt.master(0), torch.ones(4))
    opt.step()
    torch.testing.assert_close(opt.master(0), torch.full((4,), 0.9))
    opt.close()


def test_a_step_that_fails_on_all_ranks_keeps_each_ones_error(world):
    param, opt = made(world)
    with pytest.raises(ZeroDivisionError):
        raise_in("closure", opt, param)
    opt.close()
    with pytest.raises(ZeroDivisionError):
        raise_in("closure", opt, param)


def test_a_closure_that_fails_after_a_step_of_its_own_is_told_once(world):
    param, opt = made(world)
    param.grad = torch.ones(4)

    def closure():
        opt.step()
        if world.rank == world.size - 1:
            raise ZeroDivisionError("no step")
        return 1.0

    with pytest.raises(ZeroDivisionError if world.rank == world.size - 1 else xc.UsageError, match="no step"):
        opt.step(closure)
    opt.step()
    torch.testing.assert_close(opt.master(0), torch.full((4,), 0.8))
    opt.close()


def test_an_error_that_is_raised_again_is_told_again(world):
    param, opt = made(world)
    param.grad = torch.ones(4)
    always = ZeroDivisionError("no step")

    def closure():
        raise always

    fails = world.rank == world.size - 1
    for _ in range(3):
        with pytest.raises(ZeroDivisionError if fails else xc.UsageError, match="no step"):
            opt.step(closure) if fails else opt.step()
    opt.step()
    torch.testing.assert_close(opt.master(0), torch.full((4,), 0.9))
    opt.close()


class Renaming(xc.SGD):
    """A user's own, which gives errors another name."""

    def step(self, closure=None):
        try:
            return super().step(closure)
        except ZeroDivisionError as error:
            raise RuntimeError("no step") from error


def test_an_error_that_a_subclass_renames_is_told_once(world):
    param = torch.nn.Parameter(torch.ones(4))
    opt = Renaming([param], lr=0.1, world=world)
    param.grad = torch.ones(4)

    def closure():
        raise ZeroDivisionError("no step")

    fails = world.rank == world.size - 1
    for turn in range(1, 3):
        with pytest.raises(RuntimeError if fails else xc.UsageError, match="no step"):
            opt.step(closure) if fails else opt.step()
        opt.step()
        torch.testing.assert_close(opt.master(0), torch.full((4,), 1 - 0.1 * turn))
    opt.close()


def test_another_optimizers_failure_inside_a_closure_is_everybodys(world):
    param, opt = made(world)
    other_param, other = made(world)
    param.grad = other_param.grad = torch.ones(4)

    def fail():
        raise ZeroDivisionError("no step")

    def closure():
        other.step(fail if world.rank == world.size - 1 else None)

    with pytest.raises((ZeroDivisionError, xc.UsageError), match="no step"):
        opt.step(closure)
    for each in (opt, other):
        each.step()
        torch.testing.assert_close(each.master(0), torch.full((4,), 0.9))
        each.close()
