"""What the phases of post-local SGD cost: a fused step, a step of every worker alone, one that averages, a round.

    mpirun -n 2 python benchmarks/local_steps.py

All take turns in one run; times are the slowest rank's, medians over the rounds, and `ratio` is the time over the fused
step's. A round is of H = 16 steps, and its time and words are those of one.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from race import WARM_UP, race
from rivals import Contestant

import extrapcomm as xc

LR = 1e-4


@dataclass(frozen=True)
class Case:
    """Steps in words per parameter: for each worker, and beside."""

    name: str
    words: tuple[int, int]
    local_steps: int
    steps: int = 1
    start: int = 0


CASES = [
    Case("fused", (2, 4), 1, start=2**62),
    Case("alone", (5, 0), 2**62),
    Case("averaging", (5 + 2 + 1, 1 + 1), 1),  # with the means of weights and of momenta
    Case("H = 16", (16 * 5 + 2 + 1, 1 + 1), 16, steps=16),
]


class LocalSteps(Contestant):
    """An optimizer in its local phase, with gradients of zeros that lie in shared memory."""

    def __init__(self, world: xc.World, case: Case, layers: list[int]) -> None:
        self._steps = case.steps
        params = [torch.nn.Parameter(torch.ones(count)) for count in layers]
        how = {"lr": LR, "momentum": 0.9, "gradients": "view", "world": world}
        self._opt = xc.PostLocalSGD(params, start=case.start, local_steps=case.local_steps, **how)
        for v in range(world.workers):
            with self._opt.worker(v):
                for param in params:
                    param.grad = torch.zeros_like(param)
                self._opt.zero_grad()

    def step(self) -> None:
        """Collective if the case averages."""
        for _ in range(self._steps):
            self._opt.step()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=25_000_000, help="parameters")
    parser.add_argument("--layers", type=int, default=100, help="of equal size")
    parser.add_argument("--workers", type=int, default=1, help="workers per rank")
    parser.add_argument("--rounds", type=int, default=11)
    return parser.parse_args()


def main() -> None:
    args = options()
    world = xc.World(workers=args.workers)
    layers = [args.count // args.layers] * args.layers
    turns = np.median(
        race(world.comm, [LocalSteps(world, case, layers) for case in CASES], args.rounds, WARM_UP), axis=0
    )
    if world.rank == 0:
        print(f"# {sum(layers)} parameters in {args.layers} layers, {world.K} workers, float32")
        print("#     step   time(ms)  words  ratio")
        for case, turn in zip(CASES, turns, strict=True):
            words = (case.words[0] * world.K + case.words[1]) / case.steps
            time, plain = turn / case.steps, turns[0]
            print(f"{case.name:>10} {1e3 * time:10.2f} {words:6.4g} {time / plain:6.2f}")


if __name__ == "__main__":
    main()
