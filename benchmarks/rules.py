"""What every rule costs: the fused step of all of them in one run, beside the same step by mpi4py and torch.

    mpirun -n 2 python benchmarks/rules.py

The rules and their rivals take turns, in a new random order each round, so a disturbance of the machine hits all
alike. Times are the slowest rank's, medians over the rounds. A word is one access of four bytes per parameter by the
whole node, K workers together; `words` counts what a rule must read and write, `GB/s` is that per second, and `ratio`
is the time over that of the plain rule with the same state, SGD with momentum or Adam. `x torch` is the time of the
rival in torch_rules.py, all-reduce and update, over that of the fused step.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from race import WARM_UP, race, share_cores
from rivals import Contestant
from torch_rules import has_rival, make_rival

import extrapcomm as xc

Seconds = dict[str, float]

LR = 1e-4
GRADIENT = 0.25


@dataclass(frozen=True)
class Case:
    """A rule with its options; words are passes, each as (times a worker's array is touched, other accesses)."""

    name: str
    rule: str
    like: str
    words: tuple[tuple[int, int], ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        """Hyper-parameters; `gain` is the lag of an AdaScale."""
        momentum = {"momentum": 0.9} if self.like == "sgd" else {}
        return {"lr": LR, **momentum, **self.options}

    def words_for(self, workers: int) -> int:
        return sum(each * workers + shared for each, shared in self.words)


CLIP = {"max_grad_norm": 1.0}
CASES = [
    Case("sgd", "sgd", "sgd", ((2, 4),)),
    Case("sgd, local", "sgd", "sgd", ((2, 4),), {"extrapolation": "local", "inner_lr": LR}),
    Case("sgd, clipped", "sgd", "sgd", ((1, 0), (2, 4)), CLIP),
    Case("sgd, gain", "sgd", "sgd", ((1, 0), (2, 4)), {"gain": 0}),
    Case("sgd, lagging gain", "sgd", "sgd", ((2, 4),), {"gain": 1}),
    Case("vrsgd", "vrsgd", "sgd", ((1, 0), (2, 4))),
    Case("vrsgd, last mean", "vrsgd", "sgd", ((2, 4),), {"lagged_mean": True}),
    Case("lars", "lars", "sgd", ((1, 1), (2, 4))),
    Case("adam", "adam", "adam", ((2, 6),)),
    Case("adam, amsgrad", "adam", "adam", ((2, 8),), {"amsgrad": True}),
    Case("adam, clipped", "adam", "adam", ((1, 0), (2, 6)), CLIP),
    Case("clars", "clars", "sgd", ((1, 1), (2, 4))),
    Case("eg", "eg", "sgd", ((1, 2), (2, 8))),
    Case("vradam", "vradam", "adam", ((1, 0), (2, 8))),
    Case("lamb", "lamb", "adam", ((1, 5), (1, 4))),
    Case("lamb, clipped", "lamb", "adam", ((1, 0), (1, 5), (1, 4)), CLIP),
    Case("vrlamb", "vrlamb", "adam", ((1, 0), (1, 7), (1, 4))),
    Case("lans", "lans", "adam", ((1, 0), (1, 5), (2, 4))),
    Case("sgdp", "sgdp", "sgd", ((1, 3), (1, 3))),
    Case("adamp", "adamp", "adam", ((1, 5), (1, 4))),
    Case("adamp, nesterov", "adamp", "adam", ((1, 5), (2, 4)), {"nesterov": True}),
]


def make_engine(world: xc.World, weights: list[torch.Tensor], rule: str, **options: Any) -> xc.Engine:
    """An engine with a case's options."""
    if "gain" in options:
        options["gain"] = xc.AdaScale(lag=options["gain"])
    return xc.Engine(world, weights, rule, **options)


class Fused(Contestant):
    """One engine on its own memory."""

    def __init__(self, world: xc.World, case: Case, weights: list[torch.Tensor]) -> None:
        self.engine = make_engine(world, weights, case.rule, **case.all_options)
        for worker in self.engine.workers:
            for gradient in worker.grads:
                gradient.fill_(GRADIENT)

    def step(self) -> None:
        self.engine.step()

    def close(self) -> None:
        self.engine.close()


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


def weights_for(args: argparse.Namespace) -> list[torch.Tensor]:
    return [torch.ones(args.count // args.layers // args.filter, args.filter)] * args.layers


def time_together(world: xc.World, cases: list[Case], args: argparse.Namespace) -> tuple[Seconds, Seconds]:
    """Medians of the fused rules and of their rivals, whose gradients lie in the same memory."""
    weights = weights_for(args)
    count = sum(weight.numel() for weight in weights)
    grads = [torch.full((count,), GRADIENT / world.K) for _ in range(world.workers)]
    with_rival = [case for case in cases if has_rival(case.rule)]
    everyone = [Fused(world, case, weights) for case in cases]
    everyone += [make_rival(world.comm, weights, grads, case.rule, **case.all_options) for case in with_rival]
    times = np.median(race(world.comm, everyone, args.rounds, WARM_UP), axis=0)
    for each in everyone:
        each.close()
    names = [case.name for case in with_rival]
    fused = dict(zip((case.name for case in cases), times, strict=False))
    return fused, dict(zip(names, times[len(cases) :], strict=True))


def show(count: int, world: xc.World, cases: list[Case], fused: Seconds, rivals: Seconds) -> None:
    for case in cases:
        time, words = fused[case.name], case.words_for(world.K)
        speed, ratio = 4 * words * count / time / 1e9, time / fused[case.like]
        rival = f"{rivals[case.name] / time:8.2f}" if case.name in rivals else "       -"
        print(f"{case.name:>18} {1e3 * time:10.2f} {words:6} {speed:6.1f} {ratio:6.2f} {rival}")


def main() -> None:
    args = options()
    world = xc.World(workers=args.workers)
    share_cores(world.comm)
    count = sum(weight.numel() for weight in weights_for(args))
    if world.rank == 0:
        print(
            f"# {count} parameters in {args.layers} layers, filters of {args.filter}, {world.K} workers, float32"
        )
        print("#             rule   time(ms)  words   GB/s  ratio  x torch")
    for like in ("sgd", "adam"):
        cases = [case for case in CASES if case.like == like and (world.K > 1 or "gain" not in case.options)]
        fused, rivals = time_together(world, cases, args)
        if world.rank == 0:
            show(count, world, cases, fused, rivals)


if __name__ == "__main__":
    main()
