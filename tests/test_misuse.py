"""Mistakes are errors that say what to do, the same on every rank, and leave everything as it was."""

import json
import logging
import os

import numpy as np
import pytest
from conftest import COMM
from mpi4py import MPI
from reference import assert_same_bits

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
    with pytest.raises(xc.Error, match=text):
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
    with pytest.raises(xc.UsageError, match=r"gradient of parameter '0\.0' is sparse"):
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


def bits_of(opt):
    """Every master weight and every weight of this rank's model."""
    count = sum(len(group["params"]) for group in opt.param_groups)
    held = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    return [opt.master(i) for i in range(count)] + held


def assert_untouched(opt, before):
    for now, then in zip(bits_of(opt), before, strict=True):
        assert_same_bits(now.numpy(), then.numpy())


def displaced(world, **hyper):
    """A model and its optimizer after two steps, every rank at a point of its own."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    opt = xc.ExtrapSGD(
        model.parameters(), **{"lr": 0.1, "momentum": 0.9, "inner_lr": "lr", **hyper}, world=world
    )
    for _ in range(2):
        give_gradients(model, world.rank + 1.0)
        opt.step()
    return model, opt


def give_gradients(model, value):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


MODELS = {
    "order": (
        lambda odd: [
            torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (4, 2))[:: -1 if odd else 1]
        ],
        r"\(3, 2\).*\(4, 2\)",
    ),
    "number": (
        lambda odd: [torch.nn.Parameter(torch.ones(3)) for _ in range(2 + odd)],
        "2 parameters.*3 parameters",
    ),
    "strides": (
        lambda odd: [torch.nn.Parameter(torch.ones(3, 2).t() if odd else torch.ones(2, 3))],
        r"strides.*\(3, 1\).*\(1, 2\)",
    ),
    "type": (
        lambda odd: [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16 if odd else torch.float32))],
        "float32.*bfloat16",
    ),
    "groups": (
        lambda odd: [{"params": [torch.nn.Parameter(torch.ones(3))]} for _ in range(1 + odd)],
        r"1 parameter groups.*2 parameter groups",
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_differ_between_ranks_are_named(world, what):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    build, text = MODELS[what]
    with pytest.raises(xc.MismatchError, match=text):
        xc.SGD(build(is_odd(world)), lr=0.1, world=world)


def test_rules_that_differ_between_ranks_are_named(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    kind = xc.Adam if is_odd(world) else xc.SGD
    with pytest.raises(xc.MismatchError, match=r"rank 0 makes a SGD, rank \d a Adam"):
        kind([torch.nn.Parameter(torch.ones(3))], lr=0.1, world=world)


@pytest.mark.parametrize(
    ("name", "value", "odd_value"),
    [
        ("lr", 0.1, 0.1 * (1 + 1e-11)),
        ("momentum", 0.9, 0.8),
        ("weight_decay", 0.0, 0.01),
        ("inner_lr", 0.1, 0.2),
    ],
)
def test_hyper_parameters_that_differ_in_a_step_are_named_and_nothing_moves(world, name, value, odd_value):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model, opt = displaced(world)
    before = bits_of(opt)
    opt.param_groups[0][name] = odd_value if is_odd(world) else value
    with pytest.raises(xc.MismatchError, match="parameter group 0 is"):
        opt.step()
    assert_untouched(opt, before)
    opt.param_groups[0][name] = value
    opt.step()
    opt.close()


def test_rates_that_differ_in_the_last_bits_are_rank_0s(world):
    model, opt = displaced(world)
    opt.param_groups[0]["lr"] = 0.1 * (1 + 1e-14 * world.rank)
    opt.step()
    of_rank_0 = world.comm.bcast(opt.master(0).numpy())
    assert_same_bits(opt.master(0).numpy(), of_rank_0)
    opt.close()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda opt, saved: opt.adopt(), "adopt"),
        (lambda opt, saved: opt.load_state_dict(saved), "load_state_dict"),
    ],
    ids=["adopt", "load_state_dict"],
)
def test_other_call_than_the_others_step_is_an_error_on_all_and_nothing_moves(world, call, name):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model, opt = displaced(world)
    saved, before = opt.state_dict(), bits_of(opt)
    give_gradients(model, 1.0)
    with pytest.raises(xc.MismatchError, match=f"rank 0 is in step .*rank {world.size - 1} is in {name}"):
        call(opt, saved) if is_odd(world) else opt.step()
    assert_untouched(opt, before)
    opt.step()
    opt.close()


def test_parameters_with_gaps_train_as_torchs(team):
    def slices():
        every = torch.arange(48, dtype=torch.float64).reshape(6, 8)
        return [
            torch.nn.Parameter(view)
            for view in (every[::2, ::3], every.t()[1:3], every[:1].expand(4, 8).clone())
        ]

    ours, theirs = slices(), slices()
    assert not ours[0].is_contiguous()
    opt, wanted = (
        xc.SGD(ours, lr=0.1, momentum=0.9, world=team),
        torch.optim.SGD(theirs, lr=0.1, momentum=0.9),
    )
    for _ in range(3):
        opt.zero_grad()
        wanted.zero_grad()
        for v in range(team.workers):
            with opt.worker(v):
                sum((w**2).sum() for w in ours).backward()
        sum((w**2).sum() for w in theirs).backward()
        opt.step()
        wanted.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-12, atol=1e-12)
    opt.close()


def errors_in_a_fork(calls):
    """For each call the error that it raises in a forked child of this process; None if none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps({name: error_of(call) for name, call in calls.items()}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told)


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_forked_process_is_refused_and_its_parent_goes_on(world):
    model, opt = displaced(world)
    engine, array = xc.Engine(world, np.ones(3)), xc.arena_array(3, world=world)
    saved, before = opt.state_dict(), bits_of(opt)
    refused = {
        "step": opt.step,
        "adopt": opt.adopt,
        "master": lambda: opt.master(0),
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict(saved),
        "master_weights": lambda: opt.master_weights().__enter__(),
        "add_param_group": lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
        "sync_buffers": lambda: opt.sync_buffers(model),
        "engine.step": engine.step,
        "engine.master": engine.master,
        "all_reduce": lambda: xc.all_reduce(array),
        "Engine": lambda: xc.Engine(world, np.ones(3)),
        "arena_array": lambda: xc.arena_array(3, world=world),
    }
    errors = errors_in_a_fork(refused | {"close": opt.close, "world.close": world.close})
    assert errors.pop("close") is errors.pop("world.close") is None
    for name, error in errors.items():
        assert error and error.startswith("UsageError: this process was forked"), (name, error)
    assert_untouched(opt, before)
    opt.step()
    engine.step()
    xc.all_reduce(array)
    for each in (opt, engine, array):
        each.close()


def test_closed_optimizer_can_be_read_but_not_changed(world):
    model, opt = displaced(world)
    saved, wanted = opt.state_dict(), [opt.master(i) for i in range(2)]
    world.comm.Barrier()
    opt.close()
    for i, p in enumerate(model.parameters()):
        assert torch.equal(opt.master(i), wanted[i])
        assert torch.equal(p, wanted[i])
    for call in (
        lambda: opt.master_weights().__enter__(),
        lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
        lambda: opt.load_state_dict(saved),
    ):
        with pytest.raises(xc.UsageError, match="closed"):
            call()
    opt.zero_grad()
    with opt.worker(0):
        model(torch.ones(1, 5)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_closed_world_refuses_buffers_and_constructions():
    model = torch.nn.BatchNorm1d(3)
    opt = xc.SGD(model.parameters(), lr=0.1)
    opt.close()
    for call in (
        lambda: opt.sync_buffers(model),
        lambda: xc.SGD(model.parameters(), lr=0.1, world=opt.world),
    ):
        with pytest.raises(xc.UsageError, match="world is closed"):
            call()
