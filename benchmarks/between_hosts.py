"""Steps between hosts: seconds and bytes of the engine beside mpi4py's collectives with torch's SGD.

All ranks hold one gradient each. `sent` is what the busiest host's interface sent in one step; `by rate` is the time
that so many bytes take at --rate. On one machine with a link of that rate between two hosts of its own:

    python tests/clusters/hosts.py --ranks 2 2 --rate 1gbit -- python benchmarks/between_hosts.py --rate 1e9
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from mpi4py import MPI
from problem import Problem
from rivals import Fused, MpiTorch, MpiZero1

import extrapcomm as xc

COMM = MPI.COMM_WORLD
CONTESTANTS = {"engine": Fused, "mpi_torch": MpiTorch, "mpi_zero1": MpiZero1}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000, help="parameters, float32")
    parser.add_argument("--steps", type=int, default=7, help="timed steps; the median is shown")
    parser.add_argument("--interface", default="eth0", help="whose bytes are counted")
    parser.add_argument("--rate", type=float, help="bits per second of a host's link")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem(args.count, torch.float32, COMM.rank, COMM.size, 1)
    with xc.World() as world:
        rows = {name: measured(make(problem, world), args) for name, make in CONTESTANTS.items()}
        if world.rank == 0:
            show(rows, world, args)


def measured(contestant, args):
    """(seconds, bytes): medians over the steps, of the slowest rank and of the busiest host."""
    steps = [timed(contestant, args.interface) for _ in range(args.steps + 2)][2:]
    contestant.close()
    return [statistics.median(column) for column in zip(*steps, strict=True)]


def timed(contestant, interface):
    contestant.prepare()
    COMM.Barrier()
    before, since = bytes_sent(interface), time.perf_counter()
    contestant.step()
    seconds = COMM.allreduce(time.perf_counter() - since, MPI.MAX)
    return seconds, COMM.allreduce(bytes_sent(interface) - before, MPI.MAX)


def bytes_sent(interface):
    """Of this host's; in /proc, because /sys shows the network of whoever mounted it."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(
        int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith(f"{interface}:")
    )


def show(rows, world, args):
    teams = " + ".join(str(len(team)) for team in world.teams)
    print(
        f"{args.count:,} parameters, float32, {teams} ranks; time / ours is the rival's time by the engine's"
    )
    print("                 seconds   sent MB   by rate   time / ours   bytes / ours")
    ours = rows["engine"]
    for name, (seconds, sent) in rows.items():
        by_rate = f"{sent * 8 / args.rate:9.4f}" if args.rate else "        -"
        print(
            f"{name:14} {seconds:9.4f} {sent / 1e6:9.2f} {by_rate} {seconds / ours[0]:13.2f} {sent / ours[1]:14.2f}"
        )


if __name__ == "__main__":
    main()
