"""The bits depend on the number of workers and on nothing else: not on tiles, ranks or the run."""

import hashlib
from contextlib import closing

import numpy as np
import pytest
from conftest import COMM, LIMITS, TEAM
from reference import RULES

import extrapcomm as xc

LENGTHS = [3000, 1, 1111, 40, 2500]
NESTEROV = {
    "rule": "sgd",
    "extrapolation": "local",
    "lr": 0.05,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-3,
}
ADAM = {"rule": "adam", "lr": 0.01, "weight_decay": 1e-3}
FILTERS = [(5, 600), (1, 1), (11, 101), (20, 2), (2, 5, 10, 25)]  # as long as LENGTHS
ADAMP = {"rule": "adamp", "lr": 0.01, "weight_decay": 1e-3, "delta": 100.0, "shapes": FILTERS}
SGDP = {"rule": "sgdp", "lr": 0.05, "momentum": 0.9, "nesterov": True, "delta": 100.0, "shapes": FILTERS}
SHARED_OPTIONS = {"nesterov": NESTEROV, "adam": ADAM, "adamp": ADAMP, "sgdp": SGDP}
SHARED_OPTIONS |= {
    rule: {"rule": rule, "lr": 0.01, "extrapolation": "anisotropic"}
    for rule in xc._core.rules()
    if rule not in SHARED_OPTIONS
}
SHARED_OPTIONS |= {
    kind: {"rule": "lamb", "lr": 0.01, "extrapolation": kind, "seed": 3, "shapes": FILTERS}
    for kind in ("gaussian", "uniform", "filter")
}
SHARED = pytest.mark.parametrize("options", SHARED_OPTIONS.values(), ids=SHARED_OPTIONS.keys())


def run(world, steps=5, tile=4096, dtype="float32", seed=0, shapes=LENGTHS, **options):
    """SHA-256 of the master weights and of all workers' published weights after some steps."""
    random = np.random.RandomState(seed)  # its uniform numbers are the same everywhere and for ever

    def values():
        return [random.uniform(-1, 1, n).astype(dtype) for n in shapes]

    engine = xc.Engine(world, values(), tile=tile, **options)
    first = world.rank * world.workers
    for _ in range(steps):
        grads = [values() for _ in range(world.K)]
        for worker, mine in zip(engine.workers, grads[first : first + world.workers], strict=True):
            for view, g, x in zip(worker.grads, mine, worker.weights, strict=True):
                view[...] = g + x
        engine.step()
    published = b"".join(x.tobytes() for worker in engine.workers for x in worker.weights)
    master = b"".join(w.tobytes() for w in engine.master())
    engine.close()
    return hashlib.sha256(master + b"".join(world.comm.allgather(published))).hexdigest()


@SHARED
def test_tile_size_does_not_change_the_bits(team, options):
    assert len({run(team, tile=tile, **options) for tile in (1, 7, 64, 1000, 4096, 100_000)}) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("extrapolation", xc._core.extrapolations())
def test_streaming_past_the_cache_does_not_change_the_bits(team, dtype, extrapolation):
    options = {**NESTEROV, "extrapolation": extrapolation, "dtype": dtype, "shapes": FILTERS}
    cached = run(team, streaming=False, **options)
    assert {run(team, streaming=True, tile=tile, **options) for tile in (7, 512, 1000)} == {cached}


@pytest.mark.skipif(bool(TEAM), reason="both ways are tried inside one team")
def test_the_faster_way_of_storing_is_found_in_steps_that_have_the_same_bits(team):
    count = 400_000
    engines = {
        ways: xc.Engine(team, np.ones(count, "float32"), streaming=ways, **NESTEROV)
        for ways in (None, True, False)
    }
    for worker in (worker for engine in engines.values() for worker in engine.workers):
        worker.grads[...] = np.linspace(-1, 1, count, dtype="float32")
    tried = []
    for _ in range(30):
        tried.append(engines[None].streaming)
        for engine in engines.values():
            engine.step()
    assert tried[:24] == [None] * 24 and isinstance(engines[None].streaming, bool)
    assert engines[True].streaming is True and engines[False].streaming is False
    for engine in engines.values():
        for worker, other in zip(engine.workers, engines[None].workers, strict=True):
            np.testing.assert_array_equal(worker.weights, other.weights)
    for engine in engines.values():
        engine.close()


@pytest.mark.skipif(bool(TEAM), reason="lengths of tiles are tried inside one team")
def test_tiles_that_suit_are_found_in_steps_that_have_the_same_bits(team):
    count = 300_000
    rule = {"rule": "adamp", "lr": 0.01, "weight_decay": 0.01}
    engines = {
        tile: xc.Engine(team, np.ones((600, 500), "float32"), tile=tile, **rule) for tile in (None, 512)
    }
    for worker in (worker for engine in engines.values() for worker in engine.workers):
        worker.grads[...] = np.linspace(-1, 1, count, dtype="float32").reshape(600, 500)
    tried = []
    for _ in range(63):
        tried.append(engines[None].tile)
        for engine in engines.values():
            engine.step()
    assert tried[:60] == [None] * 60 and tried[62] in (512, 1024, 2048)
    assert engines[512].tile == 512
    for worker, other in zip(engines[512].workers, engines[None].workers, strict=True):
        np.testing.assert_array_equal(worker.weights, other.weights)
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("variable, text", [("XC_TILE", "x"), ("XC_TILE", "0"), ("XC_STORE", "24")])
def test_the_environment_takes_numbers(team, monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(xc.UsageError, match=variable):
        xc.Engine(team, np.ones(4, "float32"), lr=0.1)


def test_the_environment_overrides_tiles(team, monkeypatch):
    monkeypatch.setenv("XC_TILE", "96")
    with closing(xc.Engine(team, np.ones(4096, "float32"), tile=512, lr=0.1)) as engine:
        assert engine.tile == 96


FUSED = {
    "sgd": {"rule": "sgd"},
    "momentum": {"rule": "sgd", "momentum": 0.9, "dampening": 0.2, "weight_decay": 1e-3},
    "nesterov": NESTEROV,
    "decoupled": {"rule": "sgd", "momentum": 0.9, "decoupled_weight_decay": True, "weight_decay": 1e-3},
    "maximize": {"rule": "sgd", "momentum": 0.9, "maximize": True},
    "adam": ADAM,
    "adamw": {"rule": "adam", "decoupled_weight_decay": True, "weight_decay": 1e-3},
    "amsgrad": {"rule": "adam", "amsgrad": True},
    "lars": {"rule": "lars", "momentum": 0.9, "weight_decay": 1e-3},
    "lamb": {"rule": "lamb", "weight_decay": 1e-3},
    "lans": {"rule": "lans", "weight_decay": 1e-3},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("displacement", ["none", "preconditioned", "raw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_loops_of_their_own_have_the_bits_of_the_reference(team, pair, name, dtype, displacement, streaming):
    """The commonest steps are one loop each, for 1, 2 and 4 workers; 3 and 7 have the stages."""
    options = {"lr": 0.01, **FUSED[name], "extrapolation": "none" if displacement == "none" else "local"}
    options |= {} if displacement == "none" else {"displacement": displacement}
    twins = pair(team, LENGTHS, dtype, streaming=streaming, **options)
    for _ in range(3):
        twins.step()
    twins.compare(1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_give_the_same_bits(team, rule):
    assert run(team, rule=rule) == run(team, rule=rule)
    assert run(team, rule=rule) != run(team, rule=rule, seed=1)


@pytest.mark.parametrize(
    "rule, dtype, extrapolation",
    [(rule, "float32", "local") for rule in RULES]
    + [("sgd", "float64", "global"), ("adam", "float64", "local")],
)
def test_zero_inner_rate_is_the_plain_optimizer(team, rule, dtype, extrapolation):
    plain = run(team, rule=rule, dtype=dtype)
    assert run(team, rule=rule, dtype=dtype, extrapolation=extrapolation, inner_lr=0.0) == plain
    assert run(team, rule=rule, dtype=dtype, extrapolation=extrapolation, inner_lr=0.1) != plain


@pytest.mark.parametrize("ranks", [1, 2, 4])
@SHARED
def test_four_workers_give_the_same_bits_on_any_number_of_ranks(virtual, ranks, options):
    if COMM.size < ranks:
        pytest.skip(f"needs {ranks} ranks")
    part = COMM.Split(COMM.rank // ranks, COMM.rank)
    if part.size == ranks:
        with xc.World(part, workers=4 // ranks, **LIMITS) as world:
            got = run(world, **options)
    else:
        got = run(virtual(4), **options)
    part.Free()
    assert got == run(virtual(4), **options)


GOLDEN = {
    "nesterov": (NESTEROV, "d99ee072a7b542c23176292943198f797c16cb051645c733b067aa339c090d3f"),
    "adam": (ADAM, "a38d1a806aa9f22636e3f238a4764da1ead6ce908f7cb37dcbc8e4ee41b9059b"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_hundred_steps_give_the_golden_bits(virtual, name):
    """The same on every machine and build; a change here changes every user's results."""
    options, golden = GOLDEN[name]
    assert run(virtual(4), steps=100, **options) == golden


@pytest.mark.parametrize("lag", [0, 1])
def test_tile_size_does_not_change_the_bits_of_a_gain(team, lag):
    """In float64, where products are rounded and so no sum may be taken in another order."""
    if team.K < 2:
        pytest.skip("needs two workers")
    options = {**NESTEROV, "dtype": "float64"}
    assert len({run(team, tile=n, gain=xc.AdaScale(lag=lag), **options) for n in (7, 100, 4096)}) == 1
