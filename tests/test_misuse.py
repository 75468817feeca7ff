"""Mistakes are errors that say what to do, the same on every rank, and leave everything as it was."""

import logging

import numpy as np
import pytest
from conftest import COMM
from mpi4py import MPI

import extrapcomm as xc

torch = pytest.importorskip("torch")


def is_odd(world):
    return world.rank == world.size - 1


def test_refused_hyper_parameters_do_not_stay(world):
    engine = xc.Engine(world, np.ones(3), lr=0.5)
    engine.grads[:] = 1
    for wrong in (
        {"lr": float("nan")},
        {"momentum": 0.9},
        {"nesterov": True},
        {"decoupled_weight_decay": True},
    ):
        with pytest.raises(xc.UsageError):
            engine.step(**wrong)
    engine.step()
    assert engine.weights.tolist() == [0.5] * 3
    engine.close()


def test_different_constructions_are_named(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(
        xc.MismatchError, match=r"rank 0 makes a Engine, rank \d a float32 array of shape \(3,\)"
    ):
        xc.arena_array(3, world=world) if is_odd(world) else xc.Engine(world, np.ones(3))
    with pytest.raises(
        xc.MismatchError, match=r"array of shape \(2, 3\), rank \d a float32 array of shape \(3, 2\)"
    ):
        xc.arena_array((3, 2) if is_odd(world) else (2, 3), world=world)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tile": 0}, "tile must be"),
        ({"tile": "x"}, "tile must be"),
        ({"lr": -1.0}, "lr must not be negative"),
        ({"nesterov": True}, "Nesterov"),
        ({"inner_lr": "fast"}, "inner_lr must be"),
        ({"extrapolation": "lokal"}, "there is no extrapolation 'lokal'"),
    ],
)
def test_wrong_options_of_one_rank_are_an_error_of_all(world, options, text):
    chosen = options if is_odd(world) else {}
    with pytest.raises(xc.UsageError, match=text):
        xc.SGD(torch.nn.Linear(2, 2).parameters(), world=world, **chosen)
    with pytest.raises(xc.UsageError, match=text):
        xc.Engine(world, np.ones(3), **chosen)


WRONG_PARAMETERS = {
    "twice": lambda w: [w, w],
    "int64": lambda w: [w, torch.zeros(3, dtype=torch.int64)],
    "complex64": lambda w: [w, torch.zeros(3, dtype=torch.complex64)],
    "sparse": lambda w: [torch.zeros(3).to_sparse()],
    "empty parameter list": lambda w: [],
    "float64 master weights": lambda w: [w, torch.zeros(3, dtype=torch.float64)],
    "meta": lambda w: [torch.zeros(3, device="meta")],
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("text", WRONG_PARAMETERS)
def test_wrong_parameters_of_one_rank_are_an_error_of_all(world, text):
    good = [torch.nn.Parameter(torch.ones(3))]
    wrong = WRONG_PARAMETERS[text](good[0]) if is_odd(world) else good
    with pytest.raises((xc.Error, ValueError), match=text):
        xc.SGD(wrong, lr=0.1, world=world)


def test_model_of_another_type_after_the_optimizer_is_refused(world):
    model = torch.nn.Linear(20, 20)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    if is_odd(world):
        model.double()
    model(torch.zeros(1, 20, dtype=model.weight.dtype)).sum().backward()
    with pytest.raises(xc.UsageError, match="written or replaced outside"):
        opt.step()
    with pytest.raises(xc.UsageError, match="another shape or type"):
        opt.adopt()
    opt.close()


def test_gradients_of_any_layout_are_taken(team):
    w = torch.nn.Parameter(torch.zeros(3, 4))
    opt = xc.SGD([w], lr=1.0, world=team)
    for v in range(team.workers):
        with opt.worker(v):
            w.grad = torch.arange(12.0).reshape(4, 3).t()
    opt.step()
    torch.testing.assert_close(w.detach(), -torch.arange(12.0).reshape(4, 3).t())
    for v in range(team.workers):
        with opt.worker(v):
            w.grad = torch.ones(1, 1).expand(3, 4)
    opt.step()
    torch.testing.assert_close(w.detach(), -torch.arange(12.0).reshape(4, 3).t() - 1)
    opt.close()


def test_sparse_gradient_of_one_rank_is_an_error_of_all(world):
    table = torch.nn.Embedding(5, 2, sparse=is_odd(world))
    opt = xc.SGD(table.parameters(), lr=0.1, world=world)
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(xc.UsageError, match="a gradient is sparse"):
        opt.step()
    opt.close()


def test_worker_that_was_forgotten_is_warned_of_once(caplog):
    with xc.World(MPI.COMM_SELF, workers=3) as world, caplog.at_level(logging.WARNING, "extrapcomm"):
        w = torch.nn.Parameter(torch.ones(2))
        opt = xc.SGD([w], lr=0.1, world=world)
        for _ in range(2):
            opt.zero_grad()
            w.sum().backward()
            opt.step()
        assert [r.message for r in caplog.records if "2 of this rank's 3 workers" in r.message] != []
        assert len(caplog.records) == 1
        opt.close()


def test_closing_inside_master_weights_ends_both(world):
    model = torch.nn.Linear(2, 2)
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, world=world)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    world.comm.Barrier()
    with opt.master_weights():
        wanted = model.weight.clone()
        opt.close()
    assert torch.equal(model.weight, wanted)
    with pytest.raises(xc.UsageError, match="closed"):
        opt.step()


def test_closed_things_refuse_work():
    world = xc.World(MPI.COMM_SELF)
    engine, array = xc.Engine(world, np.ones(3)), xc.arena_array(3, world=world)
    other = xc.arena_array(3, world=world)
    array.close()
    with pytest.raises(xc.UsageError, match="closed"):
        xc.all_reduce(array)
    world.close()
    with pytest.raises(xc.UsageError, match="world is closed"):
        engine.step()
    with pytest.raises(xc.UsageError, match="world is closed"):
        xc.all_reduce(other)
    with pytest.raises(xc.UsageError, match="world is closed"):
        xc.Engine(world, np.ones(3))


def test_worlds_that_optimizers_made_end_with_them():
    if COMM.size > 1:
        pytest.skip("one process is enough")
    for _ in range(50):
        opt = xc.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        opt.close()
        with pytest.raises(xc.UsageError, match="world is closed"):
            opt.world.team  # noqa: B018


def test_structures_of_arrays_cannot_be_assigned_to(world):
    engine = xc.Engine(world, {"a": np.ones(3)})
    with pytest.raises(TypeError):
        engine.grads["a"] = np.zeros(3)
    with pytest.raises(AttributeError):
        engine.grads = {"a": np.zeros(3)}
    with pytest.raises(AttributeError):
        engine.workers[0].grads = np.zeros(3)
    engine.close()


def test_things_that_are_no_arrays_or_worlds_are_named():
    with pytest.raises(xc.UsageError, match="arena_array"):
        xc.all_reduce(np.ones(3))
    with pytest.raises(xc.UsageError, match="must be a World"):
        xc.Engine(MPI.COMM_SELF, np.ones(3))
    with pytest.raises(xc.UsageError, match="must be a World"):
        xc.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, world=MPI.COMM_SELF)
    with pytest.raises(xc.UsageError, match="intracommunicator"):
        xc.World("world")
    for options in ({"workers": 0}, {"workers": 2.5}, {"workers": True}, {"step_timeout": -1}):
        with pytest.raises(xc.UsageError):
            xc.World(MPI.COMM_SELF, **options)


def test_momentum_through_zero_is_torchs(team):
    ours, theirs = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    opt = xc.SGD([ours], lr=0.1, momentum=0.9, world=team)
    wanted = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(8):
        for w, o in ((ours, opt), (theirs, wanted)):
            o.param_groups[0]["momentum"] = 0.0 if step % 3 == 1 else 0.9
            o.zero_grad()
            for v in range(team.workers if o is opt else 1):
                if o is opt:
                    with opt.worker(v):
                        (w**3).sum().backward()
                else:
                    (w**3).sum().backward()
            o.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)
    opt.close()
