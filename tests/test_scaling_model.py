"""The formulas for many nodes keep to their limits, and to the simulation."""

import dataclasses
import json

import model
import numpy as np
import pytest
import scaling
from conftest import COMM
from model import ALGORITHMS, CELL, WORD, Job, Machine, fused
from simulate import simulate, write_step

pytestmark = pytest.mark.skipif(COMM.size > 1, reason="the same on every rank; runs in the plain suite")
MACHINE = Machine(wire=12.5e9, latency=2e-6, overhead=0.5e-6, memory=100e9)
SLOW_WIRE = dataclasses.replace(MACHINE, wire=1e9)
SLOW_MEMORY = dataclasses.replace(MACHINE, memory=10e9)
FREE = Machine(wire=1e30, latency=0.0, overhead=0.0, memory=1e30)
COUNT = 3 << 17
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@every_algorithm
@pytest.mark.parametrize("nodes, ranks_per_node", [(2, 1), (2, 3), (4, 2), (8, 1), (16, 2)])
def test_node_sends_the_least_that_an_all_reduce_can(algorithm, nodes, ranks_per_node):
    """2 (M - 1) / M of the parameters, however many ranks a node has; with two nodes, each parameter once."""
    job = Job(nodes * ranks_per_node * CELL * 6, nodes, ranks_per_node)
    outcome = simulate(job, MACHINE, algorithm, 4 * CELL)
    least = 2 * (nodes - 1) * WORD * job.parameters // nodes
    assert outcome.sent.tolist() == [least] * nodes
    assert 2 * job.sent(job.segment) == least
    assert nodes != 2 or least == WORD * job.parameters


def test_rails_and_a_ring_of_single_ranks_take_the_same_wire():
    """With nothing but the wire to pay for, and chunks too small to count."""
    only_wire = dataclasses.replace(FREE, wire=1e9)
    job = Job(8 * 1000 * CELL, 8, 1)
    assert fused(job, only_wire, chunk=CELL) == pytest.approx(model.ring(job, only_wire), rel=1e-3)


@every_algorithm
@pytest.mark.parametrize("machine", [MACHINE, SLOW_WIRE, SLOW_MEMORY])
def test_step_of_more_parameters_takes_longer(algorithm, machine):
    sizes = [10**i for i in range(4, 10)]
    seconds = [fused(Job(size, 8, 4), machine, algorithm) for size in sizes]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", model.RIVALS)
def test_rival_of_more_parameters_takes_longer(name):
    seconds = [model.RIVALS[name](Job(10**i, 8, 4), MACHINE) for i in range(4, 10)]
    assert seconds == sorted(seconds)


@every_algorithm
@pytest.mark.parametrize("machine", [MACHINE, SLOW_WIRE, SLOW_MEMORY], ids=["even", "wire", "memory"])
@pytest.mark.parametrize("nodes, ranks_per_node", [(2, 1), (2, 4), (4, 4), (8, 2), (16, 1)])
@pytest.mark.parametrize("chunk", [CELL, 4 * CELL])
def test_simulation_takes_what_the_formula_says(algorithm, machine, nodes, ranks_per_node, chunk):
    job = Job(COUNT, nodes, ranks_per_node)
    simulated = simulate(job, machine, algorithm, chunk).seconds
    assert simulated == pytest.approx(fused(job, machine, algorithm, chunk), rel=0.1)


@every_algorithm
@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_simulation_loses_no_event(algorithm, nodes):
    job = Job(COUNT, nodes, 2)
    tasks = write_step(job, MACHINE, algorithm, 4 * CELL, window=2)
    outcome = simulate(job, MACHINE, algorithm, 4 * CELL, window=2)
    chunks = -(-job.segment // (4 * CELL))
    messages = {"direct": 2 * (nodes - 1), "halving": 2 * int(np.log2(nodes))}[algorithm]
    assert outcome.done == len(tasks)
    assert outcome.arrived == sum(len(task.sends) for task in tasks) == job.ranks * chunks * messages


@every_algorithm
def test_everybody_waits_for_the_last(algorithm):
    job = Job(COUNT, 4, 2)
    plain = simulate(job, MACHINE, algorithm, CELL)
    late = simulate(job, MACHINE, algorithm, CELL, late=[0.0] * 7 + [0.125])
    assert late.seconds == pytest.approx(plain.seconds + 0.125)


def test_slow_rank_costs_least_when_the_wire_is_what_all_wait_for():
    job, slowness = Job(COUNT, 4, 2), [1.0] * 7 + [1.5]
    costs = [slowdown(job, machine, slowness) for machine in (SLOW_WIRE, SLOW_MEMORY)]
    assert costs[0] < 1.1 < 1.4 < costs[1] <= 1.5


def slowdown(job, machine, slowness):
    slow, plain = (simulate(job, machine, "direct", CELL, slowness=each) for each in (slowness, ()))
    return slow.seconds / plain.seconds


@pytest.mark.parametrize("parameters", [10_000, 25_000_000, 7_000_000_000])
@pytest.mark.parametrize("ranks", [1, 2, 8, 48, 1024, 100_000])
def test_efficiency_is_a_part_of_one(parameters, ranks):
    made = scaling.row(parameters, ranks, 8, MACHINE, compute=0.1)
    assert all(0 < part <= 1 for part in made["weak"].values())
    assert all(0 < gain <= ranks for gain in made["strong"].values())


def test_one_node_takes_one_pass():
    assert fused(Job(COUNT, 1, 2), MACHINE) == WORD * COUNT * (2 * 2 + 4) / MACHINE.memory


def test_what_costs_nothing_takes_no_time():
    job = Job(COUNT, 8, 2)
    contestants = [fused(job, FREE, name) for name in ALGORITHMS] + [
        r(job, FREE) for r in model.RIVALS.values()
    ]
    assert max(contestants) < 1e-15


def test_halving_needs_fewer_messages_where_nodes_are_many():
    machine = dataclasses.replace(FREE, overhead=1e-6)
    job = Job(1024 * CELL, 1024, 1)
    assert model.best_algorithm(job, machine) == "halving"
    assert not model.can_run("halving", 12)


def test_comparison_prints_measured_over_predicted(tmp_path, capsys):
    case = {
        "hosts": 2,
        "ranks_per_host": 2,
        "parameters": COUNT,
        "rate_bits": 1e9,
        "latency_s": 1e-4,
        "chunk": CELL,
    }
    machine = Machine(wire=1e9 / 8, latency=1e-4, overhead=2e-6, memory=20e9)
    case["seconds"] = 1.25 * fused(Job(COUNT, 2, 2), machine, "direct", CELL)
    (tmp_path / "times.json").write_text(json.dumps([case]))
    args = scaling.parse_arguments(
        ["compare", str(tmp_path / "times.json"), "--memory", "20", "--overhead", "2"]
    )
    args.run(args)
    assert capsys.readouterr().out.endswith(" 1.250\n")
