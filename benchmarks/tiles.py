"""What tile size, streaming, element type and clipping do to the fused step, all in one run.

    mpirun -n 2 python benchmarks/tiles.py --count 8000000
    python benchmarks/tiles.py --count 500000 --workers 32
    mpirun -n 2 python benchmarks/tiles.py --tiles 512 --guards none max_grad_norm skip_nonfinite

The variants take turns, in a new random order each round, so a disturbance of the machine hits all alike. With
`--turn 16` each finds in the caches what its own steps have left there, instead of what another variant has. Times are
the slowest rank's, medians over the rounds. `floor` is what the step must read and write, per second; `params` are
parameters per second relative to the first line.
"""

import argparse
import itertools
import time
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import extrapcomm as xc

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Variant = tuple[str, str, int, str]  # element type, stores, tile, guard
GUARDS: dict[str, dict[str, Any]] = {
    "none": {},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=8_000_000, help="parameters")
    parser.add_argument("--workers", type=int, default=1, help="workers per rank")
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--stores", choices=("streamed", "cached"), nargs="+", default=["streamed", "cached"])
    parser.add_argument("--guards", choices=GUARDS, nargs="+", default=["none"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--turn", type=int, default=1, help="steps in a row, of which the last counts")
    return parser.parse_args()


def make_engine(world: xc.World, count: int, dtype: str, stores: str, tile: int, guard: str) -> xc.Engine:
    weights = torch.ones(count, dtype=DTYPES[dtype])
    rule = {"momentum": 0.9, "lr": 1e-3, "extrapolation": "local", "inner_lr": 1e-2}
    engine = xc.Engine(world, weights, tile=tile, streaming=stores == "streamed", **rule, **GUARDS[guard])
    for worker in engine.workers:
        worker.grads.fill_(0.25)
    return engine


def time_step(world: xc.World, engine: xc.Engine) -> float:
    world.comm.Barrier()
    start = time.perf_counter()
    engine.step()
    return world.comm.allreduce(time.perf_counter() - start, MPI.MAX)


def main() -> None:
    args = options()
    world = xc.World(workers=args.workers)
    variants = list(itertools.product(args.dtypes, args.stores, args.tiles, args.guards))
    engines = {variant: make_engine(world, args.count, *variant) for variant in variants}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    order = np.random.default_rng(0)
    for number in range(args.rounds + 2):
        for i in order.permutation(len(variants)):
            spent = [time_step(world, engines[variants[i]]) for _ in range(args.turn)][-1]
            if number >= 2:
                seconds[variants[i]].append(spent)
    if world.rank == 0:
        show(args.count, world.K, seconds)


def show(count: int, workers: int, seconds: dict[Variant, list[float]]) -> None:
    print(f"# {count} parameters, {workers} workers")
    print("#    dtype  stores    tile  guard           time(ms)  p95(ms)  floor(GB/s)  params")
    first = float(np.median(next(iter(seconds.values()))))
    for (dtype, stores, tile, guard), spent in seconds.items():
        median, late = float(np.median(spent)), float(np.percentile(spent, 95))
        floor = count * (2 * workers * DTYPES[dtype].itemsize + 16) / median / 1e9
        figures = f"{1e3 * median:8.2f} {1e3 * late:8.2f}  {floor:11.1f}  {first / median:6.2f}"
        print(f"{dtype:>10}  {stores:8} {tile:5}  {guard:14}  {figures}")


if __name__ == "__main__":
    main()
