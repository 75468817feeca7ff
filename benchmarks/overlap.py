"""How much of the reducing leg hides behind backward: training with and without `overlap`, on several teams.

    python tests/clusters/hosts.py --ranks 1 1 --rate 1gbit -- python benchmarks/overlap.py

or on one machine `mpirun -n 4 python benchmarks/overlap.py --team 2`. Both take turns; times are the slowest rank's,
medians over the rounds. `leg` is the reducing leg alone, a reduce_scatter of as many elements. `hidden` is the part of
it by which backward and step together are shorter with overlap.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI

import extrapcomm as xc

COMM = MPI.COMM_WORLD


class Training:
    """A perceptron of equal layers and an optimizer."""

    def __init__(self, world: xc.World, args: argparse.Namespace, overlap: bool) -> None:
        torch.manual_seed(0)
        layers = [
            layer
            for _ in range(args.layers)
            for layer in (torch.nn.Linear(args.width, args.width), torch.nn.Tanh())
        ]
        self._model = torch.nn.Sequential(*layers)
        how = {"gradients": "hook", "overlap": overlap, "bucket": args.bucket, "world": world}
        self._opt = xc.SGD(self._model.parameters(), lr=1e-3, momentum=0.9, **how)
        self._x = torch.randn(args.batch, args.width)
        self.early = 0.0

    @property
    def elements(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self._model.parameters())

    def times(self) -> list[float]:
        """Collective: seconds of backward, and of backward and step."""
        self._opt.zero_grad()
        loss = self._model(self._x).square().mean()
        COMM.Barrier()
        since = time.perf_counter()
        loss.backward()
        backward = time.perf_counter() - since
        self._opt.step()
        both = time.perf_counter() - since
        self.early = self._opt.overlapped_part
        return [backward, both]


def leg_of(world: xc.World, elements: int) -> Callable[[], list[float]]:
    """Collective: a function that times the reducing leg alone."""
    array = xc.arena_array(elements, "float32", world)

    def times() -> list[float]:
        COMM.Barrier()
        since = time.perf_counter()
        xc.reduce_scatter(array)
        return [time.perf_counter() - since]

    return times


def main() -> None:
    """Prints one line of times in ms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[512])
    parser.add_argument("--bucket", type=int, nargs="+", default=[1 << 18])
    parser.add_argument("--team", type=int, help="ranks per team; by default those of one host")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(itertools.product(args.batch, args.bucket))
    if COMM.rank == 0:
        print("  batch  bucket backward   plain slower overlap     leg  hidden   early")
    with xc.World(workers_per_team=args.team) as world:
        for args.batch, args.bucket in cases:
            race(world, args)


def race(world: xc.World, args: argparse.Namespace) -> None:
    """Collective: one line."""
    plain, overlapped = Training(world, args, False), Training(world, args, True)
    leg = leg_of(world, plain.elements)
    rounds, early = [], []
    for _ in range(2 + args.rounds):
        rounds.append([*plain.times(), *overlapped.times(), *leg()])
        early.append(overlapped.early)
    slowest = np.array(rounds[2:])
    COMM.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
    backward, without, slowed, with_overlap, alone = 1e3 * np.median(slowest, axis=0)
    part = COMM.allreduce(float(np.median(early[2:]))) / COMM.size
    if COMM.rank == 0:
        hidden = (without - with_overlap) / alone
        print(
            f"{args.batch:7d} {args.bucket:7d} {backward:8.1f} {without:7.1f} {slowed - backward:6.1f} "
            f"{with_overlap:7.1f} {alone:7.1f} {hidden:7.2f} {part:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
