"""Counts the instructions of one step of every rule, with Valgrind's callgrind.

    python benchmarks/instructions.py

For machines on which the processor's own counters cannot be read, such as most virtual ones; load does not change what
is counted. `per parameter` is for one step of two workers in one process, `words` as in rules.py. The last lines count
a step of 100 small tensors, by extrapcomm and by torch. Needs valgrind (apt-get install valgrind) and several minutes.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hand_written import compiler
from race import cpu_model
from rules import CASES, GRADIENT, Case, make_engine, weights_for

import extrapcomm as xc

FOLDER = "XC_COUNTS"  # set in the process that valgrind runs: where it leaves its counts
STEPS = 3
WARM_UP = 3
SMALL_TENSORS = 100
REQUESTS = """
#include <valgrind/callgrind.h>
extern "C" void toggle() { CALLGRIND_TOGGLE_COLLECT; }
extern "C" void dump() { CALLGRIND_DUMP_STATS; }
"""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500_000, help="parameters")
    parser.add_argument("--layers", type=int, default=10, help="of equal size")
    parser.add_argument(
        "--filter", type=int, default=500, help="elements of a filter, which some rules measure"
    )
    return parser.parse_args()


def main() -> int:
    if folder := os.environ.get(FOLDER):
        count_all(options(), Counter(Path(folder)))
        sys.stdout.flush()
        os._exit(0)  # torch cannot be unloaded under valgrind
    options()
    if not (shutil.which("valgrind") and compiler()):
        print(
            "instructions.py needs valgrind and a C++ compiler: apt-get install valgrind g++", file=sys.stderr
        )
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        fixed = {FOLDER: temporary, "XC_STORE": "64", "XC_TILE": "512", "OMP_NUM_THREADS": "1"}
        command = ["valgrind", "--quiet", "--tool=callgrind", "--collect-atstart=no"]
        into = f"--callgrind-out-file={temporary}/counts"
        return subprocess.run([*command, into, sys.executable, *sys.argv], env=os.environ | fixed).returncode


class Counter:
    """The instructions of calls, less what counting itself takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests = ctypes.CDLL(str(compile_requests(folder)))
        self.own = 0
        self.own = self(lambda: None) * STEPS

    def __call__(self, call: Callable[[], object]) -> int:
        for _ in range(WARM_UP):
            call()
        self.requests.toggle()
        for _ in range(STEPS):
            call()
        self.requests.toggle()
        before = set(self.folder.iterdir())
        self.requests.dump()
        (counts,) = set(self.folder.iterdir()) - before
        total = next(line for line in counts.read_text().splitlines() if line.startswith("totals:"))
        return (int(total.split()[1]) - self.own) // STEPS


def compile_requests(folder: Path) -> Path:
    """Valgrind reads what a program asks of it from instruction sequences that its header has."""
    source, library = folder / "requests.cpp", folder / "requests.so"
    source.write_text(REQUESTS)
    subprocess.run([compiler(), "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def count_all(args: argparse.Namespace, counter: Counter) -> None:
    world = xc.World(workers=2)
    print(
        f"# {args.count} parameters in {args.layers} layers, 2 workers of one process, float32, {cpu_model()}"
    )
    print("#             rule  words  per parameter", flush=True)
    for case in CASES:
        instructions = count_rule(world, case, args, counter)
        words = case.words_for(world.K)
        print(f"{case.name:>18} {words:6} {instructions / args.count:14.2f}", flush=True)
    print(f"# step of {SMALL_TENSORS} tensors  instructions", flush=True)
    alone = xc.World(workers=1)
    for name, make in {"xc.SGD": xc.SGD, "torch.optim.SGD": torch.optim.SGD}.items():
        more = {"world": alone} if make is xc.SGD else {"fused": True}
        print(f"{name:>24} {count_small(make, counter, **more):13}", flush=True)


def count_rule(world: xc.World, case: Case, args: argparse.Namespace, counter: Counter) -> int:
    engine = make_engine(world, weights_for(args), case.rule, **case.all_options)
    for worker in engine.workers:
        for gradient in worker.grads:
            gradient.fill_(GRADIENT)
    instructions = counter(engine.step)
    engine.close()
    return instructions


def count_small(make: Callable[..., torch.optim.Optimizer], counter: Counter, **more: object) -> int:
    params = [torch.nn.Parameter(torch.ones(16)) for _ in range(SMALL_TENSORS)]
    optimizer = make(params, lr=1e-3, momentum=0.9, **more)
    for param in params:
        param.grad = torch.full_like(param, GRADIENT)
    return counter(optimizer.step)


if __name__ == "__main__":
    sys.exit(main())
