"""Errors have the documented classes at any number of ranks, and their causes stay with them."""

import math

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")


def parameter():
    return torch.nn.Parameter(torch.ones(3))


# Errors that torch, NumPy or Python raise by themselves inside a construction.
FOREIGN = {
    "no parameters": (lambda world: xc.SGD([], world=world), "empty parameter list", ValueError),
    "one tensor": (lambda world: xc.SGD(parameter(), world=world), "iterable", TypeError),
    "a number": (lambda world: xc.SGD(3, world=world), "int", TypeError),
    "not a leaf": (lambda world: xc.Adam([parameter() * 2], world=world), "non-leaf", ValueError),
    "text": (lambda world: xc.Adam(["weight"], world=world), "can only optimize Tensors", TypeError),
    "in two groups": (
        lambda world: xc.LARS([{"params": [p]} for p in [parameter()] * 2], world=world),
        "more than one parameter group",
        ValueError,
    ),
    "array type": (lambda world: xc.arena_array(3, "no type", world=world), "no type", TypeError),
    "array shape": (lambda world: xc.arena_array("three", world=world), "str", TypeError),
    "array shape of floats": (lambda world: xc.arena_array((1.5,), world=world), "float", TypeError),
    "timeout": (lambda world: xc.World(world.comm, step_timeout="soon"), "soon", ValueError),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_errors_of_other_libraries_become_usage_errors(world, case):
    make, text, cause = FOREIGN[case]
    with pytest.raises(xc.UsageError, match=text) as caught:
        make(world)
    assert isinstance(caught.value.__cause__, cause)
    assert isinstance(caught.value, ValueError)


OWN = {
    "lr": (lambda world: xc.SGD([parameter()], lr=math.nan, world=world), xc.UsageError),
    "meta": (
        lambda world: xc.SGD([torch.nn.Parameter(torch.ones(3, device="meta"))], world=world),
        xc.DeviceError,
    ),
    "integers": (lambda world: xc.Engine(world, np.ones(3, "int64")), xc.UsageError),
}


@pytest.mark.parametrize("case", OWN)
def test_own_errors_keep_their_class(world, case):
    make, kind = OWN[case]
    with pytest.raises(kind) as caught:
        make(world)
    assert type(caught.value) is kind


@pytest.mark.parametrize("wrong", ["twice", "text", "switch"])
def test_refused_group_is_a_usage_error_and_changes_nothing(world, wrong):
    first = parameter()
    opt = xc.SGD([first], lr=0.5, world=world)
    group = {
        "twice": {"params": [first]},
        "text": {"params": ["weight"]},
        "switch": {"params": [parameter()], "amsgrad": True},
    }[wrong]
    with pytest.raises(xc.UsageError):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    first.grad = torch.ones(3)
    opt.step()
    assert first.tolist() == [0.5] * 3
    opt.close()


UNFIT = {
    "nothing": {},
    "no groups": {"state": {}},
    "text": {"state": {}, "param_groups": "groups"},
    "state of another kind": {"state": {0: {"master": "weights"}}, "param_groups": [{"params": [0]}]},
}


@pytest.mark.parametrize("state", UNFIT)
def test_what_is_no_state_dict_is_a_usage_error(world, state):
    opt = xc.SGD([parameter()], lr=0.5, world=world)
    with pytest.raises(xc.UsageError):
        opt.load_state_dict(UNFIT[state])
    opt.close()


def test_a_step_that_finds_a_foreign_error_raises_a_usage_error(world):
    p = parameter()
    opt = xc.SGD([p], lr=0.5, world=world)
    opt.param_groups[0]["lr"] = object()
    p.grad = torch.ones(3)
    with pytest.raises(xc.UsageError):
        opt.step()
    opt.close()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_words_are_no_numbers(world, name):
    with pytest.raises(xc.UsageError, match=f"{name} must be a number, not '0.1'"):
        xc.SGD([parameter()], **{"lr": 0.1, name: "0.1"}, world=world)


def test_workers_are_whole_numbers(worlds):
    opt = xc.SGD([parameter(), parameter()], lr=0.1, world=worlds(2))
    for wrong in (True, False, 2, -1, 0.5, "1", None):
        with pytest.raises(xc.UsageError, match="there is no worker"), opt.worker(wrong):
            pass
    with opt.worker(np.int64(1)):
        assert opt._binding.bound == 1
    assert opt._binding.bound == 0
    opt.close()


def test_contexts_of_workers_end_in_their_order(worlds):
    opt = xc.SGD([parameter()], lr=0.1, world=worlds(2))
    first, second = opt.worker(1), opt.worker(0)
    first.__enter__()
    second.__enter__()
    with pytest.raises(xc.UsageError, match="reverse order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert opt._binding.bound == 0
    opt.close()
