"""master_weights() shows w itself, the same on all ranks, and restores every worker's point bit for bit."""

import numpy as np
import pytest
from conftest import COMM, loaded, stored
from reference import WORKING, assert_same_bits, bits, rounded

import extrapcomm as xc

LENGTHS = [1500, 3, 900]


@pytest.fixture(params=WORKING)
def engine(request, team):
    """An engine one step after the start, its workers at points of their own."""
    random = np.random.default_rng(0)
    weights = [stored(random.normal(size=n).astype("float32"), request.param) for n in LENGTHS]
    engine = xc.Engine(team, weights, extrapolation="local", inner_lr=1.0)
    for worker in engine.workers:
        for view in worker.grads:
            view[...] = stored(random.normal(size=len(view)).astype("float32") + team.rank, request.param)
    engine.step(lr=0.1)
    yield engine
    engine.close()


def points(engine):
    return [[loaded(view).copy() for view in worker.weights] for worker in engine.workers]


def assert_same_points(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)


def test_weights_hold_the_master_weights_inside_only(engine):
    before = points(engine)
    with engine.master_weights():
        for view, w in zip(engine.weights, engine.master(), strict=True):
            assert_same_bits(loaded(view), rounded(w, str(view.dtype).removeprefix("torch.")))
    assert_same_points(points(engine), before)
    assert any((bits(x) != bits(w)).any() for x, w in zip(before[0], engine.master(), strict=True))


def test_points_come_back_after_an_exception(engine):
    before = points(engine)
    with pytest.raises(KeyError), engine.master_weights():
        raise KeyError
    assert_same_points(points(engine), before)


def test_what_is_written_inside_is_forgotten(engine):
    before, master = points(engine), engine.master()
    with engine.master_weights():
        for view in engine.weights:
            view[...] = 0
    assert_same_points(points(engine), before)
    assert_same_points([engine.master()], [master])


def test_infinities_and_negative_zeros_come_back(team):
    engine = xc.Engine(team, np.zeros(4, "float32"), extrapolation="local", inner_lr=1.0)
    for worker in engine.workers:
        worker.grads[...] = [np.inf, -0.0, np.nan, 1]
    engine.step(lr=0.0)
    before = [worker.weights.copy() for worker in engine.workers]
    with engine.master_weights():
        pass
    for worker, x in zip(engine.workers, before, strict=True):
        assert_same_bits(worker.weights, x)
    engine.close()


def test_master_returns_private_copies(engine):
    first = engine.master()
    for w in first:
        w[...] = 0
    assert any(w.any() for w in engine.master())


def test_all_ranks_see_the_same_master_weights(engine):
    mine = [w.tobytes() for w in engine.master()]
    assert all(theirs == mine for theirs in COMM.allgather(mine))


def test_one_rank_alone_may_look(engine):
    if COMM.rank == 0:
        with engine.master_weights():
            engine.master()
    engine.step()


def test_optimizer_shows_and_restores_every_worker(team):
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.arange(5.0))
    opt = xc.ExtrapSGD([p], lr=0.1, inner_lr=1.0, world=team)
    for v in range(team.workers):
        with opt.worker(v):
            (p * (v + 1 + team.rank)).sum().backward()
    opt.step()

    def values():
        for v in range(team.workers):
            with opt.worker(v):
                yield p.detach().clone().numpy()

    before = list(values())
    with pytest.raises(KeyError), opt.master_weights():
        w = p.detach().clone().numpy()
        raise KeyError
    np.testing.assert_allclose(w, np.arange(5) - 0.1 * np.mean(team_slopes(team)), rtol=1e-5, atol=1e-6)
    for got, wanted in zip(values(), before, strict=True):
        assert_same_bits(got, wanted)
    for v, x in enumerate(before):
        np.testing.assert_allclose(x, w - (v + 1 + team.rank), rtol=1e-5, atol=1e-6)
    opt.close()


def team_slopes(team):
    return [v + 1 + rank for rank in range(team.size) for v in range(team.workers)]
