"""What every rule costs: the fused step of all of them in one run, beside its words per parameter.

    mpirun -n 2 python benchmarks/rules.py

The rules take turns, in a new random order each round, so a disturbance of the machine hits all alike. Times are the
slowest rank's, medians over the rounds. A word is one access of four bytes per parameter by the whole node, K workers
together; `words` counts what a rule must read and write, `GB/s` is that per second, and `ratio` is the time over
that of the plain rule with the same state, SGD with momentum or Adam.
"""

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from race import race

import extrapcomm as xc


@dataclass(frozen=True)
class Case:
    """A rule with its options; words are passes, each as (times a worker's array is touched, other accesses)."""

    name: str
    rule: str
    like: str
    words: tuple[tuple[int, int], ...]
    options: dict[str, Any] = field(default_factory=dict)

    def words_for(self, workers: int) -> int:
        return sum(each * workers + shared for each, shared in self.words)


CLIP = {"max_grad_norm": 1.0}
CASES = [
    Case("sgd", "sgd", "sgd", ((2, 4),)),
    Case("sgd, local", "sgd", "sgd", ((2, 4),), {"extrapolation": "local"}),
    Case("sgd, clipped", "sgd", "sgd", ((1, 0), (2, 4)), CLIP),
    Case("lars", "lars", "sgd", ((1, 1), (2, 4))),
    Case("adam", "adam", "adam", ((2, 6),)),
    Case("adam, clipped", "adam", "adam", ((1, 0), (2, 6)), CLIP),
    Case("lamb", "lamb", "adam", ((1, 5), (1, 4))),
    Case("lamb, clipped", "lamb", "adam", ((1, 0), (1, 5), (1, 4)), CLIP),
    Case("lans", "lans", "adam", ((1, 0), (1, 5), (2, 4))),
    Case("sgdp", "sgdp", "sgd", ((1, 3), (1, 3))),
    Case("adamp", "adamp", "adam", ((1, 5), (1, 4))),
    Case("adamp, nesterov", "adamp", "adam", ((1, 5), (2, 4)), {"nesterov": True}),
]


class Contestant:
    """One engine on its own memory."""

    def __init__(self, world: xc.World, case: Case, layers: list[tuple[int, int]]) -> None:
        self.name = case.name
        momentum = {"momentum": 0.9} if case.like == "sgd" else {}
        weights = [torch.ones(shape) for shape in layers]
        self._engine = xc.Engine(world, weights, case.rule, lr=1e-4, **momentum, **case.options)
        for worker in self._engine.workers:
            for gradient in worker.grads:
                gradient.fill_(0.25)

    def step(self) -> None:
        """Collective."""
        self._engine.step()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=25_000_000, help="parameters")
    parser.add_argument("--layers", type=int, default=100, help="of equal size")
    parser.add_argument(
        "--filter", type=int, default=500, help="elements of a filter, which some rules measure"
    )
    parser.add_argument("--workers", type=int, default=1, help="workers per rank")
    parser.add_argument("--rounds", type=int, default=25)
    return parser.parse_args()


def main() -> None:
    args = options()
    world = xc.World(workers=args.workers)
    layers = [(args.count // args.layers // args.filter, args.filter)] * args.layers
    count = sum(math.prod(shape) for shape in layers)
    contestants = [Contestant(world, case, layers) for case in CASES]
    seconds = np.median(race(world.comm, contestants, args.rounds, 3), axis=0)
    if world.rank == 0:
        print(
            f"# {count} parameters in {args.layers} layers, filters of {args.filter}, {world.K} workers, float32"
        )
        print("#          rule   time(ms)  words   GB/s  ratio")
        plain = {case.name: time for case, time in zip(CASES, seconds, strict=True)}
        for case, time in zip(CASES, seconds, strict=True):
            words = case.words_for(world.K)
            speed = 4 * words * count / time / 1e9
            print(f"{case.name:>15} {1e3 * time:10.2f} {words:6} {speed:6.1f} {time / plain[case.like]:6.2f}")


if __name__ == "__main__":
    main()
