"""What the benchmarks race against makes the same step as the engine: all are compared with one float64 reference."""

import pytest
from conftest import COMM, TEAM

torch = pytest.importorskip("torch")

from hand_written import HAND_WRITTEN, why_not  # noqa: E402
from problem import Problem, count_wrong  # noqa: E402
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
