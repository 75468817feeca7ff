"""What the benchmarks race against makes the same step as the engine: all are compared with one float64 reference."""

import ctypes

import numpy as np
import pytest
from conftest import COMM, TEAM

torch = pytest.importorskip("torch")

from ceiling import WAYS, Memory, Pass  # noqa: E402
from hand_written import HAND_WRITTEN, compiler, why_not  # noqa: E402
from problem import Problem, count_wrong  # noqa: E402
from race import CACHES  # noqa: E402
from rivals import RIVALS, Fused, Solver, why_absent  # noqa: E402

CONTESTANTS = {"fused": Fused} | RIVALS | HAND_WRITTEN
STEPS = 3


@pytest.mark.skipif(bool(TEAM), reason="the hand-written ones work inside one team")
@pytest.mark.parametrize("displaced", [True, False], ids=["displaced", "plain"])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("count", [5, 1000])
@pytest.mark.parametrize("name", sorted(set(CONTESTANTS) - {"gloo_torch", "mpi_allreduce"}))
def test_contestants_make_the_same_step(world, name, count, displaced, rule):
    if name in HAND_WRITTEN and (reason := why_not(name, torch.float32, 1)):
        pytest.skip(reason)
    if name in RIVALS and (reason := why_absent(name, torch.float32)):
        pytest.skip(reason)
    if name == "window_compile" and (count < 1000 or COMM.size > 1):
        pytest.skip("compiles for long: one process is enough")
    if name == "unfused" and not displaced:
        pytest.skip("unfused steps displace")
    problem = Problem(count, torch.float32, world.rank, world.size, 1, displaced, rule)
    solver = CONTESTANTS[name](problem, world)
    assert isinstance(solver, Solver)
    for _ in range(STEPS):
        COMM.Barrier()
        solver.step()
    COMM.Barrier()
    assert count_wrong(problem, STEPS, solver.master(), solver.points()) == 0
    solver.close()


def test_hand_written_rivals_say_what_they_need():
    assert "float32" in why_not("hand_loop", torch.bfloat16, 1)
    assert "one worker" in why_not("window_numba", torch.float32, 2)


@pytest.mark.skipif(bool(TEAM), reason="the ceilings work inside one team")
@pytest.mark.skipif(not compiler(), reason="apt-get install g++")
@pytest.mark.parametrize(
    "shape", [Pass(True, True, 0, 2), Pass(False, True, 2, 1), Pass(True, False, 0, 0)], ids=str
)
@pytest.mark.parametrize("count", [5, 1000])
def test_a_ceiling_touches_every_stream_of_a_pass(world, count, shape):
    memory = Memory(world, count, others=4)
    places = [np.ctypeslib.as_array((ctypes.c_float * count).from_address(at)) for at in memory.places[1:]]
    grads, points, others = places[: world.K], places[world.K : 2 * world.K], places[2 * world.K :]
    streams = memory.streams_of(shape)
    for streams.past_cache, streams.ahead in WAYS:
        if world.rank == 0:
            for value, array in enumerate(grads + others, start=1):
                array[:] = value
            for array in points:
                array[:] = -1
        COMM.Barrier()
        before = [array[0] for array in others]
        COMM.Barrier()
        memory.library.pass_over(ctypes.byref(streams))
        total = sum(range(1, world.K + 1)) * shape.gradients
        total += sum(before[shape.updated : shape.updated + shape.read])
        for i, (array, was) in enumerate(zip(others, before, strict=True)):
            assert (array == (was / 2 + total if i < shape.updated else was)).all()
        for array in points:
            assert (array == (total if shape.points else -1)).all()
        COMM.Barrier()
    memory.close()


@pytest.mark.parametrize("name", CACHES)
def test_what_the_caches_hold_changes_no_gradient(world, name):
    problem = Problem(1000, torch.float32, world.rank, world.size, 1)
    for kind in (Fused, RIVALS["mpi_torch"]):
        contestant = kind(problem, world)
        CACHES[name](contestant)
        assert (
            all(torch.equal(g, problem.grads[0]) for g in contestant.gradients()) and contestant.gradients()
        )
        contestant.close()
