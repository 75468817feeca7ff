"""What the fused step should take on many nodes: measured constants, formulas, a simulation, and a comparison.

    mpirun -n 2 python benchmarks/scaling.py measure -J machine.json
    python benchmarks/scaling.py predict
    python benchmarks/scaling.py plot docs/scaling.svg
    python benchmarks/scaling.py simulate --parameters 25M --memory 50
    python benchmarks/scaling.py hosts --hosts 2 4 --rate 1gbit -J times.json
    python benchmarks/scaling.py compare times.json

model.py beside this file has the formulas, simulate.py the simulation, docs/scaling.md both in prose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from model import (
    ALGORITHMS,
    BACKWARD,
    RIVALS,
    WINDOW,
    Job,
    Machine,
    best_algorithm,
    best_fused,
    can_run,
    efficiency,
    fused,
    overlapped,
    place,
    steps,
)
from simulate import simulate

COMPUTE = {25_000_000: 0.1, 350_000_000: 0.5, 7_000_000_000: 5.0}  # s of forward and backward, one rank
NETWORKS = [(25.0, 3.0), (100.0, 2.0), (200.0, 1.5), (400.0, 1.0)]  # Gb/s and us
RANKS = [2, 8, 16, 64, 256, 1024, 4096, 16_384, 65_536, 100_000]
SOME_RANKS = [8, 64, 1024, 16_384, 100_000]
BATCH = 64  # times the compute of one rank, in all: strong scaling's fixed global batch
Rows = list[dict[str, Any]]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step times on many nodes (docs/scaling.md explains them).")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (add_measure, add_predict, add_plot, add_simulate, add_hosts, add_compare):
        command(commands)
    return parser.parse_args(words)


def add_measure(commands: Any) -> None:
    parser = commands.add_parser("measure", help="latency, bandwidth, overhead, memory and a step, here")
    parser.set_defaults(run=run_measure)
    parser.add_argument("-J", "--json", type=Path, help="write them to this file too")
    parser.add_argument("--parameters", type=count, default="25M", help="of the step that measures memory")
    parser.add_argument("--rounds", type=int, default=101)


def add_predict(commands: Any) -> None:
    parser = commands.add_parser("predict", help="step times from 2 to 100,000 ranks")
    parser.set_defaults(run=run_predict)
    add_machine(parser)
    add = parser.add_argument
    add("--ranks-per-node", type=int, default=8)
    add("--parameters", type=count, default="350M", help="of the first table")
    add("--gbits", type=float, default=100.0, help="of a node's network, each way, in the first table")
    add("--latency", type=float, default=2.0, help="us, in the first table")
    add("--compute", type=float, help="s of one rank's forward and backward (7B: 5, 350M: 0.5, 25M: 0.1)")
    add("-J", "--json", type=Path, help="write the first table to this file too")


def add_plot(commands: Any) -> None:
    parser = commands.add_parser("plot", help="weak and strong scaling as a picture; needs matplotlib")
    parser.set_defaults(run=run_plot)
    add_machine(parser)
    parser.add_argument("path", type=Path)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--gbits", type=float, default=100.0)
    parser.add_argument("--latency", type=float, default=2.0, help="us")


def add_simulate(commands: Any) -> None:
    parser = commands.add_parser("simulate", help="the pipeline event by event, beside the formula")
    parser.set_defaults(run=run_simulate)
    add_machine(parser)
    add = parser.add_argument
    add("--nodes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    add("--ranks-per-node", type=int, default=2)
    add("--parameters", type=count, default="25M")
    add("--gbits", type=float, default=100.0)
    add("--latency", type=float, default=2.0, help="us")
    add("--chunk", type=count, default="32768", help="elements")
    add("--window", type=int, default=WINDOW, help="chunks")
    add("--late", type=float, default=1.0, help="ms that a rank comes late on average, exponentially")
    add("--slow", type=float, default=0.1, help="spread of the logarithm of a rank's speed, normally")
    add("--draws", type=int, default=5)


def add_hosts(commands: Any) -> None:
    parser = commands.add_parser("hosts", help="measure on hosts made of network namespaces; for compare")
    parser.set_defaults(run=run_hosts)
    add = parser.add_argument
    add("--hosts", type=int, nargs="+", default=[2, 4])
    add("--ranks-per-host", type=int, nargs="+", default=[1])
    add("--rate", nargs="+", default=["1gbit"], help="of each host's network, as tc spells it")
    add("--delay", type=float, default=0.0, help="us from host to host")
    add("--parameters", type=count, default="4M")
    add("--rounds", type=int, default=11)
    add("-J", "--json", type=Path, required=True, help="where the cases go")


def add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="measured step times beside the formula's")
    parser.set_defaults(run=run_compare)
    add_machine(parser)
    parser.add_argument("file", type=Path, help="JSON: a list of objects, see docs/scaling.md")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=float, default=200.0, help="GB/s of a node")
    parser.add_argument("--overhead", type=float, default=0.5, help="us of each end of a message")
    parser.add_argument("--machine", type=Path, help="memory and overhead from a JSON of measure instead")


def count(text: str) -> int:
    """'25M' is 25,000,000."""
    power = " KMB".find(text[-1:].upper())
    try:
        return int(float(text[:-1] if power > 0 else text) * 1000 ** max(power, 0))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number; write 4096, 64K, 25M or 7B") from None


def network(args: argparse.Namespace, gbits: float, microseconds: float) -> Machine:
    """The network, between nodes that the arguments describe."""
    overhead, memory = args.overhead * 1e-6, args.memory * 1e9
    if args.machine:
        measured = json.loads(args.machine.read_text())
        overhead, memory = measured["overhead"], measured["memory"]
    return Machine(gbits * 1e9 / 8, microseconds * 1e-6, overhead, memory)


def write(path: Path | None, what: Any) -> None:
    if path:
        path.write_text(json.dumps(what, indent=1) + "\n")


# ---- measure ----


def run_measure(args: argparse.Namespace) -> None:
    """Collective."""
    from links import measure
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size < 2:
        raise SystemExit(
            "measure sends messages between two ranks: mpirun -n 2 python benchmarks/scaling.py measure"
        )
    found = measure(comm, args.parameters, args.rounds)
    if comm.rank == 0:
        print(
            f"latency {1e6 * found['latency']:.2f} us, overhead {1e6 * found['overhead']:.2f} us,"
            f" wire {found['wire'] / 1e9:.3f} GB/s, memory {found['memory'] / 1e9:.1f} GB/s;"
            f" {found['nodes']} nodes: step {1e3 * found['seconds']:.2f} ms"
        )
        write(args.json, found)


# ---- predict ----


def run_predict(args: argparse.Namespace) -> None:
    machine = network(args, args.gbits, args.latency)
    compute = args.compute or COMPUTE.get(args.parameters) or 0.1 * args.parameters / 25e6
    print(f"# {args.ranks_per_node} ranks per node, {machine.memory / 1e9:g} GB/s of memory,", end=" ")
    print(f"{1e6 * machine.overhead:g} us for each end of a message")
    rows = [row(args.parameters, ranks, args.ranks_per_node, machine, compute) for ranks in RANKS]
    print_steps(rows, args, compute)
    print_networks(args)
    write(args.json, rows)


def row(parameters: int, ranks: int, per_node: int, machine: Machine, compute: float) -> dict[str, Any]:
    """Seconds of everybody's step, and what is left of the compute."""
    job = place(parameters, ranks, per_node)
    weak = steps(job, machine, compute)
    strong = steps(job, machine, compute * BATCH / ranks)
    return {
        "ranks": ranks,
        "nodes": job.nodes,
        "algorithm": best_algorithm(job, machine) if job.nodes > 1 else "memory",
        "seconds": weak,
        "weak": {name: efficiency(compute, step) for name, step in weak.items()},
        "strong": {name: ranks * efficiency(compute * BATCH / ranks, step) for name, step in strong.items()},
    }


def print_steps(rows: Rows, args: argparse.Namespace, compute: float) -> None:
    names = list(rows[0]["seconds"])
    print(f"# {args.parameters} parameters, {args.gbits:g} Gb/s, {args.latency:g} us;", end=" ")
    print(f"compute {compute:g} s per rank (weak), {BATCH * compute:g} s in all (strong)")
    print("#                          step (ms)" + " " * 35 + "weak: efficiency       strong: speed-up")
    print(
        "#  ranks  nodes algorithm",
        *(f"{name:>12}" for name in names),
        "  fused overlapped   fused overlapped",
    )
    for each in rows:
        times = " ".join(f"{1e3 * each['seconds'][name]:12.2f}" for name in names)
        gains = " ".join(f"{each['weak'][name]:8.3f}" for name in ("fused", "overlapped"))
        speeds = " ".join(f"{each['strong'][name]:8.1f}" for name in ("fused", "overlapped"))
        print(f"{each['ranks']:8} {each['nodes']:6} {each['algorithm']:>9} {times} {gains} {speeds}")


def print_networks(args: argparse.Namespace) -> None:
    """How many times longer the fastest rival takes."""
    print(
        "# the fastest of "
        + ", ".join(RIVALS)
        + ": its step / the fused step; then overlapped's / the fused step"
    )
    columns = " ".join(f"{ranks:>7}" for ranks in SOME_RANKS)
    print("#  parameters   Gb/s  (us) ", columns, "  ", columns)
    for parameters, compute in COMPUTE.items():
        for gbits, microseconds in NETWORKS:
            machine = network(args, gbits, microseconds)
            jobs = [place(parameters, ranks, args.ranks_per_node) for ranks in SOME_RANKS]
            plain = " ".join(f"{against_best(job, machine):7.2f}" for job in jobs)
            hidden = " ".join(f"{against_overlapped(job, machine, compute):7.2f}" for job in jobs)
            print(f"{parameters:13} {gbits:6g} {microseconds:5g}  {plain}    {hidden}")


def against_best(job: Job, machine: Machine) -> float:
    return min(rival(job, machine) for rival in RIVALS.values()) / best_fused(job, machine)


def against_overlapped(job: Job, machine: Machine, compute: float) -> float:
    return overlapped(job, machine, BACKWARD * compute) / best_fused(job, machine)


def run_plot(args: argparse.Namespace) -> None:
    from scaling_plot import draw

    machine = network(args, args.gbits, args.latency)
    ranks = [2**i for i in range(1, 17)]
    rows = {
        parameters: [row(parameters, each, args.ranks_per_node, machine, compute) for each in ranks]
        for parameters, compute in COMPUTE.items()
    }
    draw(args.path, rows, f"{args.ranks_per_node} ranks per node, {args.gbits:g} Gb/s, {args.latency:g} µs")


# ---- simulate ----


def run_simulate(args: argparse.Namespace) -> None:
    machine, luck = network(args, args.gbits, args.latency), np.random.default_rng(0)
    print(
        f"# {args.parameters} parameters, {args.ranks_per_node} ranks per node, {machine.memory / 1e9:g} GB/s,",
        end=" ",
    )
    print(f"{args.gbits:g} Gb/s, {args.latency:g} us, chunks of {args.chunk}, window {args.window}")
    print(
        "# nodes algorithm  formula(ms) simulated(ms)  ratio   late(+ms) expected(+ms)   slow(ratio)   tasks messages"
    )
    for nodes in args.nodes:
        job = Job(args.parameters, nodes, args.ranks_per_node)
        for algorithm in ALGORITHMS:
            if can_run(algorithm, nodes):
                print_simulated(job, machine, algorithm, args, luck)


def print_simulated(
    job: Job, machine: Machine, algorithm: str, args: argparse.Namespace, luck: np.random.Generator
) -> None:
    chunk = min(args.chunk, job.segment)
    formula = fused(job, machine, algorithm, chunk, args.window)
    plain = simulate(job, machine, algorithm, chunk, args.window)
    late, slow = np.mean(
        [unlucky(job, machine, algorithm, chunk, args, luck) for _ in range(args.draws)], axis=0
    )
    print(
        f"{job.nodes:7} {algorithm:>9} {1e3 * formula:12.3f} {1e3 * plain.seconds:13.3f} {plain.seconds / formula:6.3f}"
        f" {1e3 * (late - plain.seconds):11.3f} {expected_lateness(job, args.late):13.3f}"
        f" {slow / plain.seconds:13.3f} {plain.done:7} {plain.arrived:8}"
    )


def unlucky(
    job: Job,
    machine: Machine,
    algorithm: str,
    chunk: int,
    args: argparse.Namespace,
    luck: np.random.Generator,
) -> tuple[float, float]:
    """Seconds with ranks that come late, and with ranks of different speeds."""
    late = list(luck.exponential(1e-3 * args.late, job.ranks))
    slowness = list(luck.lognormal(0.0, args.slow, job.ranks))
    return (
        simulate(job, machine, algorithm, chunk, args.window, late=late).seconds,
        simulate(job, machine, algorithm, chunk, args.window, slowness=slowness).seconds,
    )


def expected_lateness(job: Job, mean: float) -> float:
    """Of the last of R ranks that come exponentially late: mean (1 + 1/2 + ... + 1/R)."""
    return mean * float(np.sum(1 / np.arange(1, job.ranks + 1)))


# ---- hosts ----


def run_hosts(args: argparse.Namespace) -> None:
    from scaling_hosts import measure_on_hosts

    write(args.json, [case_of(found) for found in measure_on_hosts(args)])


def case_of(found: dict[str, Any]) -> dict[str, Any]:
    """What compare reads, of what was measured."""
    return {
        "hosts": found["nodes"],
        "ranks_per_host": found["ranks"] // found["nodes"],
        "latency_s": found["latency"],
        **{name: found[name] for name in ("rate_bits", "parameters", "memory", "overhead", "seconds")},
    }


# ---- compare ----


def run_compare(args: argparse.Namespace) -> None:
    cases = json.loads(args.file.read_text())
    print(
        "# hosts ranks  parameters   Gb/s  latency(us)    chunk algorithm  measured(ms) predicted(ms)  ratio"
    )
    for case in cases:
        print_compared(case, predicted(case, args))


def predicted(case: dict[str, Any], args: argparse.Namespace) -> float:
    """Seconds by the formula; a case may name its own algorithm, window, memory and overhead."""
    usual = network(args, case["rate_bits"] / 1e9, 1e6 * case["latency_s"])
    memory, overhead = case.get("memory", usual.memory), case.get("overhead", usual.overhead)
    machine = Machine(usual.wire, usual.latency, overhead, memory)
    job = Job(case["parameters"], case["hosts"], case["ranks_per_host"])
    return fused(job, machine, case.get("algorithm", "direct"), case.get("chunk"), case.get("window", WINDOW))


def print_compared(case: dict[str, Any], formula: float) -> None:
    ranks = case["hosts"] * case["ranks_per_host"]
    print(
        f"{case['hosts']:7} {ranks:5} {case['parameters']:11} {case['rate_bits'] / 1e9:6.4g}"
        f" {1e6 * case['latency_s']:12.1f} {case.get('chunk', 'best'):>8} {case.get('algorithm', 'direct'):>9}"
        f" {1e3 * case['seconds']:13.3f} {1e3 * formula:13.3f} {case['seconds'] / formula:6.3f}"
    )


def main() -> None:
    args = parse_arguments()
    args.run(args)


if __name__ == "__main__":
    main()
