"""What every rule costs: the fused step of all of them in one run, beside its words per parameter.

    mpirun -n 2 python benchmarks/rules.py

The rules take turns, in a new random order each round, so a disturbance of the machine hits all alike. Times are the
slowest rank's, medians over the rounds. A word is one access of four bytes per parameter by the whole node, K workers
together; `words` counts what a rule must read and write, `GB/s` is that per second, and `ratio` is the time over
that of the plain rule with the same state, SGD with momentum or Adam. The last rows are of post-local SGD: a step of
every worker alone, one that averages, and a round of 16 steps, of which time and words are those of one.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from race import race

import extrapcomm as xc


@dataclass(frozen=True)
class Case:
    """A rule with its options, and how many steps a turn takes.

    The words of a turn are passes, each as (times a worker's array is touched, other accesses).
    """

    name: str
    rule: str
    like: str
    words: tuple[tuple[int, int], ...]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1

    def words_for(self, workers: int) -> float:
        """Of one step."""
        return sum(each * workers + shared for each, shared in self.words) / self.steps


CLIP = {"max_grad_norm": 1.0}
ALONE = ((5, 0),)
AVERAGING = (*ALONE, (2, 1), (1, 1))  # the means of weights and of momenta
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
    Case("sgd, alone", "sgd", "sgd", ALONE, {"local_steps": 2**62}),
    Case("sgd, averaging", "sgd", "sgd", AVERAGING, {"local_steps": 1}),
    Case("sgd, H = 16", "sgd", "sgd", 15 * ALONE + AVERAGING, {"local_steps": 16}, 16),
]


class Contestant:
    """One engine on its own memory."""

    def __init__(self, world: xc.World, case: Case, layers: list[int]) -> None:
        self.name = case.name
        momentum = {"momentum": 0.9} if case.like == "sgd" else {}
        weights = [torch.ones(count) for count in layers]
        self._engine = xc.Engine(world, weights, case.rule, lr=1e-4, **momentum, **case.options)
        for worker in self._engine.workers:
            for gradient in worker.grads:
                gradient.fill_(0.25)

    def step(self) -> None:
        """Collective."""
        self._engine.step()


class LocalContestant:
    """Post-local SGD after its switch, with gradients of zeros that lie in shared memory."""

    def __init__(self, world: xc.World, case: Case, layers: list[int]) -> None:
        self.name = case.name
        self._steps = case.steps
        params = [torch.nn.Parameter(torch.ones(count)) for count in layers]
        how = {"lr": 1e-4, "momentum": 0.9, "start": 0, "gradients": "view", **case.options}
        self._opt = xc.PostLocalSGD(params, **how, world=world)
        for v in range(world.workers):
            with self._opt.worker(v):
                for param in params:
                    param.grad = torch.zeros_like(param)
                self._opt.zero_grad()

    def step(self) -> None:
        """Collective if the case averages."""
        for _ in range(self._steps):
            self._opt.step()


def contestant(world: xc.World, case: Case, layers: list[int]) -> Contestant | LocalContestant:
    return (LocalContestant if "local_steps" in case.options else Contestant)(world, case, layers)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=25_000_000, help="parameters")
    parser.add_argument("--layers", type=int, default=100, help="of equal size")
    parser.add_argument("--workers", type=int, default=1, help="workers per rank")
    parser.add_argument("--rounds", type=int, default=25)
    return parser.parse_args()


def main() -> None:
    args = options()
    world = xc.World(workers=args.workers)
    layers = [args.count // args.layers] * args.layers
    contestants = [contestant(world, case, layers) for case in CASES]
    turns = np.median(race(world.comm, contestants, args.rounds, 3), axis=0)
    seconds = turns / [case.steps for case in CASES]
    if world.rank == 0:
        print(f"# {sum(layers)} parameters in {args.layers} layers, {world.K} workers, float32")
        print("#          rule   time(ms)  words   GB/s  ratio")
        plain = {case.name: time for case, time in zip(CASES, seconds, strict=True)}
        for case, time in zip(CASES, seconds, strict=True):
            words = case.words_for(world.K)
            speed = 4 * words * sum(layers) / time / 1e9
            print(f"{case.name:>15} {1e3 * time:10.2f} {words:6.4g} {speed:6.1f} {time / plain[case.like]:6.2f}")


if __name__ == "__main__":
    main()
