"""The wire between teams: its options, the measurements that choose them, and the MPI that it must be built for."""

import json

import numpy as np
import pytest
from conftest import COMM, LIMITS

import extrapcomm as xc
from extrapcomm import communicators, wire
from extrapcomm.tune import save, tune


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16', not 'float16'"),
        ({"chunk": 0}, "chunk must be a number of elements, not 0"),
        ({"chunk": 1.5}, "chunk must be a number of elements, not 1.5"),
        ({"window": 0}, "window must be 1 to 1024 chunks, not 0"),
        ({"window": True}, "window must be 1 to 1024 chunks, not True"),
        ({"way": "ring"}, "way must be 'auto', 'direct' or 'halving', not 'ring'"),
        ({"order": "ring"}, "order must be 'tree' or 'nccl', not 'ring'"),
        ({"latency": 0}, "latency must be a positive number, not 0"),
        ({"bandwidth": float("inf")}, "bandwidth must be a positive number, not inf"),
        ({"overhead": "1"}, "overhead must be a positive number, not '1'"),
    ],
)
def test_wrong_options_are_refused(wrong, words):
    with pytest.raises(xc.UsageError, match=words):
        xc.WireOptions(**wrong)


def test_options_are_loaded_as_they_were_saved(tmp_path):
    options = {"chunk": 2048, "window": 3, "way": "direct", "latency": 1e-6, "dtype": "bfloat16"}
    save({"wire": options}, str(tmp_path / "tuning.json"))
    assert xc.WireOptions.load(tmp_path / "tuning.json") == xc.WireOptions(**options)


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"wire": {"speed": 1}}', '{"wire": 3}'])
def test_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(xc.UsageError, match="does not hold the wire's options.*extrapcomm tune -o"):
        xc.WireOptions.load(tmp_path / "tuning.json")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(xc.UsageError, match="tuning.json does not hold the wire's options"):
        xc.WireOptions.load(tmp_path / "tuning.json")


def test_options_of_another_kind_are_refused_by_all():
    with pytest.raises(xc.UsageError, match="wire must be WireOptions, not 'direct'"):
        xc.World(COMM, wire="direct", **LIMITS)


def test_ranks_with_other_options_are_told_so():
    if COMM.size == 1:
        pytest.skip("needs two ranks to differ")
    is_last = COMM.rank == COMM.size - 1
    with pytest.raises(xc.MismatchError, match="window=4.*window=3"):
        xc.World(COMM, wire=xc.WireOptions(window=3 if is_last else 4), **LIMITS)
    with pytest.raises(xc.MismatchError, match="order='tree'.*order='nccl'"):
        xc.World(COMM, wire=xc.WireOptions(order="nccl" if is_last else "tree"), **LIMITS)


def teams_of_one(**options):
    if COMM.size == 1:
        pytest.skip("several teams need two ranks")
    return xc.World(COMM, workers_per_team=1, wire=xc.WireOptions(**options), **LIMITS)


def train(world):
    """One step by the mean of the ranks' numbers; the way that its sums went."""
    engine = xc.Engine(world, np.zeros(5000, np.float32), lr=1.0)
    engine.grads[:] = world.rank
    engine.step()
    np.testing.assert_allclose(engine.master(), -(world.size - 1) / 2, rtol=1e-2)
    way = engine.way
    engine.close()
    return way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["direct", "halving"])
def test_every_way_takes_the_mean(way, dtype):
    with teams_of_one(way=way, dtype=dtype) as world:
        power_of_two = world.size & (world.size - 1) == 0
        assert train(world) == (way if power_of_two else "direct")


@pytest.mark.parametrize(
    "device, words", [("", "is for parameters on GPUs"), ("host", "takes NCCL between the ranks")]
)
def test_sums_by_nccl_are_refused_where_it_cannot_take_them(monkeypatch, device, words):
    monkeypatch.setenv("XC_DEVICE", device)
    with teams_of_one(order="nccl") as world:
        for _ in range(2):
            with pytest.raises(xc.UsageError, match=words):
                xc.Engine(world, np.zeros(5000, np.float32), lr=1.0)


def test_sums_by_nccl_take_teams_of_one_size(monkeypatch):
    if COMM.size != 3:
        pytest.skip("needs three ranks")
    monkeypatch.setenv("XC_DEVICE", "host")
    with (
        xc.World(COMM, workers_per_team=2, wire=xc.WireOptions(order="nccl"), **LIMITS) as world,
        pytest.raises(xc.UsageError, match="takes teams of one size"),
    ):
        xc.Engine(world, np.zeros(5000, np.float32), lr=1.0)


def test_plain_collectives_add_as_a_tree_whatever_the_order():
    with teams_of_one(order="nccl") as world:
        array = xc.arena_array(1000, world=world)
        array.view[:] = world.rank
        xc.all_reduce(array)
        np.testing.assert_array_equal(array.view, world.size * (world.size - 1) / 2)
        array.close()


def test_one_team_takes_no_heed_of_the_order():
    with xc.World(COMM, wire=xc.WireOptions(order="nccl"), **LIMITS) as world:
        assert len(world.teams) > 1 or train(world) == "none"


def test_way_is_chosen_by_what_messages_cost():
    with teams_of_one(latency=1e-9, overhead=1.0, bandwidth=1e12) as world:
        assert train(world) == (
            "halving" if world.size == 4 else "direct"
        )  # two messages each with two teams
    with teams_of_one(latency=1e-3, overhead=1e-9, bandwidth=1e12) as world:
        assert train(world) == "direct"


def test_one_team_has_no_way(virtual):
    assert train(virtual(1)) == "none"


def test_tuning_gives_options_that_a_world_takes(tmp_path):
    if COMM.size == 1:
        pytest.skip("several teams need two ranks")
    found = tune(COMM, 20_000, 2, workers_per_team=1)
    assert found["teams"] == found["ranks"] == COMM.size
    save(found, str(tmp_path / "tuning.json"))
    assert json.loads((tmp_path / "tuning.json").read_text()) == found
    options = COMM.bcast(xc.WireOptions.load(tmp_path / "tuning.json"))
    assert str(options.chunk) in found["seconds"]
    with xc.World(COMM, workers_per_team=1, wire=options, **LIMITS) as world:
        train(world)


def test_tuning_of_one_team_says_what_is_missing():
    with pytest.raises(xc.UsageError, match="these ranks are one.*--workers-per-team"):
        tune(COMM, 1000, 1, workers_per_team=COMM.size)


@pytest.mark.parametrize("parameters, rounds", [(0, 1), (1, 0)])
def test_tuning_needs_something_to_measure(parameters, rounds):
    with pytest.raises(xc.UsageError, match="positive number"):
        tune(COMM, parameters, rounds)


def test_mpi_without_a_wire_is_named_with_the_remedy(monkeypatch):
    if COMM.size == 1:
        pytest.skip("several teams need two ranks")
    monkeypatch.setattr(wire, "built_wires", lambda: ["someother"])
    with pytest.raises(xc.UsageError, match=r"without a wire for it \(there is: someother\).*mpicxx on PATH"):
        xc.World(COMM, workers_per_team=1, **LIMITS)


def test_wire_of_another_binary_interface_is_refused(monkeypatch):
    class Other:
        handle_size, compiled_for = 3, "Other MPI 1.0"

    monkeypatch.setattr(wire, "import_module", lambda *_: Other)
    with pytest.raises(xc.UsageError, match="built for Other MPI 1.0, whose handles have another size"):
        wire.wire_over(COMM)


def test_worlds_in_turn_use_one_communicator():
    lines = communicators._lines
    with teams_of_one() as world:
        train(world)
    before = sum(map(len, lines.values()))
    for _ in range(3):
        with teams_of_one() as world:
            train(world)
    assert sum(map(len, lines.values())) == before
