"""Worlds that nobody closes are freed, and MPI that is not running is a clear error."""

import gc
import weakref

import numpy as np
import pytest
from mpi4py import MPI
from test_faults import run_ranks

import extrapcomm as xc

torch = pytest.importorskip("torch")

FEATURES = {
    "plain": {},
    "view": {"gradients": "view"},
    "hook": {"gradients": "hook"},
    "overlap": {"overlap": True, "bucket": 4},
    "clipping": {"max_grad_norm": 1.0},
    "noise": {"extrapolation": "local", "inner_lr": "noise"},
}


def trained(world, **options):
    """An optimizer that has used its hooks, with the model that it is attached to."""
    model = torch.nn.Linear(3, 2)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world, **options)
    opt.attach(model)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    for v in range(world.workers):
        with opt.worker(v):
            model(torch.ones(1, 3)).sum().backward()
    opt.step()
    scheduler.step()
    model.load_state_dict(model.state_dict())
    opt.load_state_dict(opt.state_dict())
    opt.step()
    return opt, model


@pytest.mark.parametrize("features", FEATURES)
def test_dropped_optimizers_and_their_worlds_are_freed(world, features):
    own = xc.World(MPI.COMM_WORLD, workers=2)
    opt, model = trained(own, **FEATURES[features])
    kept = [weakref.ref(opt), weakref.ref(own)]
    del opt, own
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    assert model(torch.ones(1, 3)).isfinite().all()  # its memory stays as long as tensors look at it


def test_optimizer_with_a_gain_is_freed(world):
    own = xc.World(MPI.COMM_WORLD, workers=2)
    opt, _ = trained(own, gain=xc.AdaScale())
    kept = [weakref.ref(opt), weakref.ref(own)]
    del opt, own
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_dropped_engines_and_arrays_are_freed(world):
    own = xc.World(MPI.COMM_WORLD)
    engine, array = xc.Engine(own, np.ones(3), rule="eg"), xc.arena_array(3, world=own)
    engine.step()
    xc.all_reduce(array)
    kept = [weakref.ref(one) for one in (engine, array, own)]
    view = engine.weights
    del engine, array, own
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3
    assert view.shape == (3,)


def test_world_outlives_its_name_as_long_as_something_uses_it(world):
    engine = xc.Engine(xc.World(MPI.COMM_WORLD), np.ones(3), lr=0.5)
    gc.collect()
    engine.grads[:] = 1
    engine.step()
    assert engine.weights.tolist() == [0.5] * 3
    engine.world.close()


DROP = """
    import gc, resource, torch
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    kept = []
    for i in range(150):
        p = torch.nn.Parameter(torch.ones(4))
        opt = xc.SGD([p], lr=0.5, world=make_world())
        p.grad = torch.ones(4)
        opt.step()
        assert p.tolist() == [0.5] * 4
        if opt.world.rank == 1:  # this rank drops its optimizers later than the others
            kept = kept[-3:] + [opt]
        rank = opt.world.rank
        del opt
        if i % 10 == 9:
            gc.collect()
    say(f"rank {rank} made all")
"""


@pytest.mark.own_mpirun
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_dropped_optimizers_use_up_no_descriptors(ranks):
    code, output, _ = run_ranks(ranks, "def make_world(): return None\n" + DROP.replace("\n    ", "\n"))
    assert code == 0 and output.count("made all") == ranks, output


@pytest.mark.own_mpirun
def test_dropped_worlds_of_several_teams_use_up_no_descriptors():
    make = "def make_world(): return xc.World(workers_per_team=1)\n"
    code, output, _ = run_ranks(2, make + DROP.replace("\n    ", "\n").replace("range(150)", "range(60)"))
    assert code == 0 and output.count("made all") == 2, output


@pytest.mark.own_mpirun
def test_dropping_a_world_tells_the_ranks_that_wait_for_this_one():
    code, output, seconds = run_ranks(
        2,
        """
        world = xc.World(step_timeout=60)
        engine = engine_of(world)
        engine.step()
        if world.rank == 1:
            del engine, world
            time.sleep(5)
        else:
            try:
                engine.step()
            except xc.PeerError as error:
                report(error)
        """,
    )
    assert code == 0 and "PeerError rank=1 rank 1 left" in output, output


# -- MPI that is not running ---------------------------------------------------------------------------------------

UNSTARTED = """
    import mpi4py
    mpi4py.rc.initialize = False
    import torch
    for make in (xc.World, lambda: xc.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), lambda: xc.arena_array(3)):
        try:
            make()
        except xc.UsageError as error:
            report(error)
    from mpi4py import MPI
    MPI.Init()
    with xc.World() as world:
        say(f"then {world.size}")
    MPI.Finalize()
"""


@pytest.mark.own_mpirun
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_world_before_mpi_is_a_usage_error(ranks):
    code, output, _ = run_ranks(ranks, UNSTARTED)
    assert code == 0 and output.count("MPI is not initialized: call MPI.Init() first") == 3 * ranks, output
    assert output.count(f"then {ranks}") == ranks, output


ENDED = """
    import torch
    from mpi4py import MPI

    def attempt(what, call):
        try:
            call()
            say(f"{what}: done")
        except Exception as error:
            say(f"{what}: {type(error).__name__} {error}")

    team = TEAM
    world = xc.World(workers_per_team=team)
    model = torch.nn.BatchNorm1d(3)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world, overlap=team is not None)
    array = xc.arena_array(3, world=world)
    engine = engine_of(world)
    model(torch.ones(2, 3)).sum().backward()
    opt.step()
    MPI.Finalize()
    attempt("world", xc.World)
    attempt("optimizer", lambda: xc.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1))
    attempt("another", lambda: xc.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, world=world))
    attempt("backward", lambda: model(torch.ones(2, 3)).sum().backward())
    attempt("step", opt.step)
    attempt("engine", engine.step)
    attempt("collective", lambda: xc.all_reduce(array))
    attempt("adopt", opt.adopt)
    attempt("load", lambda: opt.load_state_dict(opt.state_dict()))
    attempt("buffers", lambda: opt.sync_buffers(model))
    attempt("comm", lambda: world.comm.Barrier())
    attempt("close", opt.close)
    attempt("leave", world.close)
    say("survived")
"""


@pytest.mark.own_mpirun
@pytest.mark.parametrize(("ranks", "team"), [(1, None), (2, None), (3, None), (2, 1), (3, 1)])
def test_everything_after_finalize_is_done_or_a_usage_error(ranks, team):
    code, output, _ = run_ranks(ranks, ENDED.replace("TEAM", repr(team)))
    assert code == 0 and output.count("survived") == ranks, output
    said = [line.split(": ", 1) for line in output.splitlines() if ": " in line]
    assert {words.split()[0] for _, words in said} == {"done", "UsageError"}, output
    refused = {what for what, words in said if words.startswith("UsageError")}
    assert {"world", "optimizer", "comm"} <= refused and not {"close", "leave", "backward"} & refused, output
    assert ({"another", "buffers"} <= refused) == (ranks > 1), output
    assert ("step" in refused) == (team is not None), output
    assert all("MPI was finalized" in words for what, words in said if what in refused), output


@pytest.mark.own_mpirun
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_null_communicator_says_that_this_rank_is_not_in_it(ranks):
    code, output, _ = run_ranks(
        ranks,
        """
        from mpi4py import MPI
        rank = MPI.COMM_WORLD.rank
        part = MPI.COMM_WORLD.Split(MPI.UNDEFINED if rank == 0 else 0)
        try:
            say(f"made one of {xc.World(part).size}")
        except xc.UsageError as error:
            report(error)
        """,
    )
    assert code == 0 and output.count("this rank is not in that communicator") == 1, output
    assert output.count(f"made one of {ranks - 1}") == ranks - 1, output


def test_communicator_of_another_kind_is_still_refused():
    for wrong in ("world", MPI.COMM_WORLD.group, 3):
        with pytest.raises(xc.UsageError, match="must be an mpi4py intracommunicator"):
            xc.World(wrong)
