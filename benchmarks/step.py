"""The fused step against its rivals, in nccl-tests' manner.

    mpirun -n 2 python benchmarks/step.py -b 64K -e 100M -f 4 -n 20 -w 5 -c 1 -d float32 -J out.json

README.md beside this file defines every figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NoReturn

import gpu
import table
import torch
import torch.distributed as dist
import train
from hand_written import HAND_WRITTEN, why_not
from mpi4py import MPI
from problem import SLOTS, Problem, count_wrong
from race import CACHES, WARM_UP, available_bytes, describe, race, share_cores
from rivals import RIVALS, Contestant, Fused, Memcpy, Solver, start_gloo, why_absent

import extrapcomm as xc

ALL = RIVALS | HAND_WRITTEN
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


class Parser(argparse.ArgumentParser):
    """All ranks see the same mistake; rank 0 tells it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if MPI.COMM_WORLD.rank == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self._print_message(message, sys.stderr)
        leave(status)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Times the fused step against its rivals (README.md defines every figure).")
    add = parser.add_argument
    add("-b", "--minbytes", type=size, default="64K", help="smallest gradient in bytes; 1K is 1024")
    add("-e", "--maxbytes", type=size, default="100M", help="largest gradient in bytes")
    add("-f", "--stepfactor", type=at_least(2), default=4, help="each size is this many times the one before")
    add("-n", "--iters", type=at_least(1), default=20, help="timed iterations")
    add("-w", "--warmup_iters", type=at_least(0), default=WARM_UP, help="iterations before the clock starts")
    add("-c", "--check", type=int, choices=(0, 1), default=1, help="compare all results with float64")
    add("-d", "--datatype", choices=DTYPES, default="float32", help="type of weights and gradients")
    add("-J", "--json", type=Path, help="write the figures to this file too")
    add("--rivals", type=rival_list, default=list(ALL), help=f"some of {','.join(ALL)}, or none")
    help_caches = "what a step finds there: what is left after the others' turns; its gradients; nothing"
    add("--caches", choices=CACHES, default="turns", help=help_caches)
    add("--plain", action="store_true", help="without the displacement: what is published is w itself")
    add("--rule", choices=SLOTS, default="sgd", help="sgd has momentum")
    add("--workers", type=at_least(1), default=1, help="workers per rank")
    shape = ("DEPTH", "WIDTH", "BATCH")
    add("--perceptron", type=int, nargs=3, default=train.PERCEPTRON, metavar=shape, help="of --train")
    add("--train", action="store_true", help="instead: forward, backward and step of a model of 100 tensors")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: another table, on GPUs, of both widths",
    )
    add("--parameters", type=at_least(1), default=100_000_000, help="of --device cuda")
    add("--overhead", action="store_true", help="instead: what the calls cost when there is nothing to do")
    args = parser.parse_args()
    complain_about(args, parser)
    return args


def size(text: str) -> int:
    """'64K' is 65536."""
    power = "KMG".find(text[-1:].upper()) + 1
    try:
        return int(float(text[:-1] if power else text) * 1024**power)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 4096, 64K, 100M or 1G") from None


def at_least(smallest: int) -> Any:
    def integer(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least {smallest}")
        return int(text)

    return integer


def rival_list(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in ALL:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(ALL)}")
    return [name for name in ALL if name in names]


def complain_about(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The mistakes that need more than one argument, or the machine, to be seen. Collective."""
    comm = MPI.COMM_WORLD
    if args.device == "cuda" and (reason := gpu.why_absent()):
        parser.error(reason)
    itemsize = DTYPES[args.datatype].itemsize
    if args.rule == "adam" and (itemsize == 2 or args.train or args.overhead or args.device == "cuda"):
        parser.error("--rule adam is for the table of steps, in float32 or float64")
    if args.minbytes < itemsize:
        parser.error(f"-b {args.minbytes} holds no element of {args.datatype} ({itemsize} bytes)")
    if args.minbytes > args.maxbytes:
        parser.error(f"-b {args.minbytes} exceeds -e {args.maxbytes}")
    if args.train and args.overhead:
        parser.error("--train and --overhead are two tables; ask for one")
    if args.train and args.workers > 1:
        parser.error("--train drives one worker per rank")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"-J {args.json}: there is no such directory")
    if comm.allreduce(comm.Split_type(MPI.COMM_TYPE_SHARED).size, MPI.MIN) < comm.size:
        parser.error("the ranks are on several nodes; this benchmark compares what happens inside one")
    complain_about_memory(args, parser, comm.bcast(available_bytes()))


def complain_about_memory(args: argparse.Namespace, parser: argparse.ArgumentParser, available: int) -> None:
    needed = bytes_needed(sweep(args, MPI.COMM_WORLD)[-1], contestants=len(args.rivals) + 2)
    if needed > available and not (args.train or args.overhead):
        parser.error(
            f"the largest size needs about {needed / 1e9:.1f} GB for all ranks and contestants,"
            f" {available / 1e9:.1f} GB are free; lower -e, or name fewer --rivals"
        )


def bytes_needed(problem: Problem, contestants: int) -> int:
    """Each contestant's w, its rule's arrays, sum and V + 1 working copies; six arrays of float64 for the check."""
    per_element = contestants * (problem.workers + 3 + problem.slots) * problem.master.itemsize + 6 * 8
    return problem.count * per_element * problem.ranks


def sweep(args: argparse.Namespace, comm: MPI.Comm) -> list[Problem]:
    dtype = DTYPES[args.datatype]
    return [
        Problem(
            bytes_ // dtype.itemsize, dtype, comm.rank, comm.size, args.workers, not args.plain, args.rule
        )
        for bytes_ in powers(args.minbytes, args.maxbytes, args.stepfactor)
    ]


def powers(smallest: int, largest: int, factor: int) -> Iterator[int]:
    while smallest <= largest:
        yield smallest
        smallest *= factor


def measure(problem: Problem, args: argparse.Namespace, world: xc.World) -> table.Result:
    """All contestants at one size, then the check of all who made the whole step."""
    present = [rival for rival in args.rivals if not reason_without(rival, args)]
    makers = {"fused": Fused, "memcpy": Memcpy} | {rival: ALL[rival] for rival in present}
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(closing(make(problem, world))) for name, make in makers.items()
        }
        before = CACHES[args.caches]
        seconds = race(world.comm, list(contestants.values()), args.iters, args.warmup_iters, before)
        wrong = check(problem, args, contestants, world.comm) if args.check else None
    return table.Result(problem, dict(zip(contestants, seconds.T, strict=True)), wrong)


def check(
    problem: Problem, args: argparse.Namespace, contestants: dict[str, Contestant], comm: MPI.Comm
) -> dict[str, int]:
    """Wrong elements by contestant, added up over the ranks."""
    steps = args.warmup_iters + args.iters
    return {
        name: comm.allreduce(count_wrong(problem, steps, solver.master(), solver.points()))
        for name, solver in contestants.items()
        if isinstance(solver, Solver)
    }


def run_sweep(args: argparse.Namespace, world: xc.World, header: dict[str, Any]) -> int:
    """The first table; the exit status."""
    columns = table.step_columns(args.rivals)
    if world.rank == 0:
        print_absent(args)
        table.print_titles(columns)
    results = []
    for problem in sweep(args, world.comm):
        results.append(measure(problem, args, world))
        if world.rank == 0:
            table.print_row(columns, results[-1])
    if world.rank == 0:
        table.print_footer(results, args.rivals)
        save(args.json, header, results)
    return 1 if any(r.nwrong for r in results) else 0


def reason_without(rival: str, args: argparse.Namespace) -> str:
    """Why a rival cannot run, or nothing."""
    dtype = DTYPES[args.datatype]
    return why_not(rival, dtype, args.workers) if rival in HAND_WRITTEN else why_absent(rival, dtype)


def print_absent(args: argparse.Namespace) -> None:
    for rival in args.rivals:
        if reason := reason_without(rival, args):
            print(f"# {rival}: {reason}")


def save(path: Path | None, header: dict[str, Any], results: list[table.Result], **tables: Any) -> None:
    if path:
        with path.open("w") as file:
            table.write_json(file, header, results, **tables)


def main() -> int:
    comm = MPI.COMM_WORLD
    args = parse_arguments()
    if args.device == "cuda":
        return run_on_gpus(args, comm)
    share_cores(comm)
    start_gloo(comm)
    with xc.World(comm, workers=args.workers) as world:
        header = describe(world)
        if comm.rank == 0:
            table.print_header(header)
        run_table = run_train if args.train or args.overhead else run_sweep
        status = run_table(args, world, header)
    dist.destroy_process_group()
    return status


def run_on_gpus(args: argparse.Namespace, comm: MPI.Comm) -> int:
    with xc.World(comm) as world:
        results = gpu.run(world, args.parameters, args.iters, args.warmup_iters)
        if world.rank == 0 and args.json:
            args.json.write_text(json.dumps([gpu.as_json(result) for result in results], indent=2) + "\n")
    return int(any(result.wrong for result in results))


def run_train(args: argparse.Namespace, world: xc.World, header: dict[str, Any]) -> int:
    name, rows = train.run(args, world)
    if world.rank == 0:
        save(args.json, header, [], **{name: rows})
    return 1 if any(row.get("nwrong") for row in rows) else 0


def leave(status: int) -> NoReturn:
    """End MPI on all ranks before the launcher sees an error and kills those who still tidy up."""
    MPI.Finalize()
    time.sleep(0.2 if status else 0)
    sys.exit(status)


def give_up() -> None:
    """One block of text, from the lowest rank that failed, then the end of the job."""
    rank = MPI.COMM_WORLD.rank
    time.sleep(0.2 * rank)
    print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    try:
        exit_status = main()
    except Exception:
        give_up()
    leave(exit_status)
