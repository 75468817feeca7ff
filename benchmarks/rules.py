"""What every rule costs: the fused step of all of them in one run, beside the same step by mpi4py and torch.

    mpirun -n 2 python benchmarks/rules.py

The rules and their rivals take turns, in a new random order each round, so a disturbance of the machine hits all
alike. Times are the slowest rank's, medians over the rounds. A word is one access of four bytes per parameter by the
whole node, K workers together; `words` counts what a rule must read and write, `GB/s` is that per second, and `ratio`
is the time over that of the plain rule with the same state, SGD with momentum or Adam. `ceiling` is the time of bare
loops over the streams of the rule's passes (ceiling.py) over that of the step: 1 is all that the machine gives.
`x torch` is the time of the rival in torch_rules.py, all-reduce and update, over that of the step.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ceiling import Ceiling, Memory, Pass
from hand_written import compiler
from race import WARM_UP, cpu_model, race, share_cores
from rivals import Contestant
from torch_rules import has_rival, make_rival

import extrapcomm as xc

LR = 1e-4
GRADIENT = 0.25
MOST_OTHERS = 4  # arrays beside the workers' that a pass touches


@dataclass(frozen=True)
class Case:
    """A rule with its options, and the passes over memory that it takes."""

    name: str
    rule: str
    like: str
    passes: tuple[Pass, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        """Hyper-parameters; `gain` is the lag of an AdaScale."""
        momentum = {"momentum": 0.9} if self.like == "sgd" else {}
        return {"lr": LR, **momentum, **self.options}

    def words_for(self, workers: int) -> int:
        return sum(one.words(workers) for one in self.passes)


CLIP = {"max_grad_norm": 1.0}
SUM = Pass(True, False, 0, 0)  # of the gradients alone
WITH_W = Pass(True, False, 1, 0)
MOMENTS = Pass(True, False, 1, 2)  # updated beside a look at w
SGD, ADAM, MORE = Pass(True, True, 0, 2), Pass(True, True, 0, 3), Pass(True, True, 0, 4)
FROM_STATE = Pass(False, True, 2, 1)  # w, by what its moments have become
BY_OWN = Pass(True, True, 2, 1)
CASES = [
    Case("sgd", "sgd", "sgd", (SGD,)),
    Case("sgd, local", "sgd", "sgd", (SGD,), {"extrapolation": "local", "inner_lr": LR}),
    Case("sgd, clipped", "sgd", "sgd", (SUM, SGD), CLIP),
    Case("sgd, gain", "sgd", "sgd", (SUM, SGD), {"gain": 0}),
    Case("sgd, lagging gain", "sgd", "sgd", (SGD,), {"gain": 1}),
    Case("vrsgd", "vrsgd", "sgd", (SUM, SGD)),
    Case("vrsgd, last mean", "vrsgd", "sgd", (SGD,), {"lagged_mean": True}),
    Case("lars", "lars", "sgd", (WITH_W, SGD)),
    Case("adam", "adam", "adam", (ADAM,)),
    Case("adam, amsgrad", "adam", "adam", (MORE,), {"amsgrad": True}),
    Case("adam, clipped", "adam", "adam", (SUM, ADAM), CLIP),
    Case("clars", "clars", "sgd", (WITH_W, SGD)),
    Case("eg", "eg", "sgd", (Pass(True, False, 2, 0), MORE)),
    Case("vradam", "vradam", "adam", (SUM, MORE)),
    Case("lamb", "lamb", "adam", (MOMENTS, FROM_STATE)),
    Case("lamb, clipped", "lamb", "adam", (SUM, MOMENTS, FROM_STATE), CLIP),
    Case("vrlamb", "vrlamb", "adam", (SUM, Pass(True, False, 1, 3), FROM_STATE)),
    Case("lans", "lans", "adam", (SUM, MOMENTS, BY_OWN)),
    Case("sgdp", "sgdp", "sgd", (Pass(True, False, 1, 1), Pass(False, True, 1, 1))),
    Case("adamp", "adamp", "adam", (MOMENTS, FROM_STATE)),
    Case("adamp, nesterov", "adamp", "adam", (MOMENTS, BY_OWN), {"nesterov": True}),
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


@dataclass(frozen=True)
class Times:
    """Medians in seconds, by the name of the case, or of its passes."""

    fused: dict[str, float]
    rivals: dict[str, float]
    ceilings: dict[tuple[Pass, ...], float]


def time_together(world: xc.World, cases: list[Case], args: argparse.Namespace) -> Times:
    """The rules, their rivals, whose gradients lie in the same memory, and the ceilings take turns."""
    weights = weights_for(args)
    count = sum(weight.numel() for weight in weights)
    grads = [torch.full((count,), GRADIENT / world.K) for _ in range(world.workers)]
    with_rival = [case for case in cases if has_rival(case.rule)]
    shapes = list(dict.fromkeys(case.passes for case in cases)) if has_compiler(world) else []
    memory = Memory(world, count, MOST_OTHERS) if shapes else None
    groups = [
        [Fused(world, case, weights) for case in cases],
        [make_rival(world.comm, weights, grads, case.rule, **case.all_options) for case in with_rival],
        [Ceiling(memory, passes) for passes in shapes if memory],
    ]
    everyone = [each for group in groups for each in group]
    times = iter(np.median(race(world.comm, everyone, args.rounds, WARM_UP), axis=0))
    for each in everyone:
        each.close()
    if memory:
        memory.close()
    keys = [[case.name for case in cases], [case.name for case in with_rival], shapes]
    return Times(*({key: float(next(times)) for key in group} for group in keys))


def has_compiler(world: xc.World) -> bool:
    """Collective: whether rank 0 can compile the ceilings."""
    return bool(world.comm.bcast(bool(compiler())))


def show(count: int, world: xc.World, cases: list[Case], times: Times) -> None:
    for case in cases:
        time, words = times.fused[case.name], case.words_for(world.K)
        figures = [4 * words * count / time / 1e9, time / times.fused[case.like]]
        others = [times.ceilings.get(case.passes), times.rivals.get(case.name)]
        cells = [f"{speed:6.1f}" if i == 0 else f"{speed:6.2f}" for i, speed in enumerate(figures)]
        cells += ["       -" if other is None else f"{other / time:8.2f}" for other in others]
        print(f"{case.name:>18} {1e3 * time:10.2f} {words:6} {' '.join(cells)}")


def main() -> None:
    args = options()
    world = xc.World(workers=args.workers)
    share_cores(world.comm)
    count = sum(weight.numel() for weight in weights_for(args))
    if world.rank == 0:
        layers = f"{args.layers} layers, filters of {args.filter}"
        print(f"# {count} parameters in {layers}, {world.K} workers, float32, {cpu_model()}")
        print("#             rule   time(ms)  words   GB/s  ratio  ceiling  x torch")
    for like in ("sgd", "adam"):
        cases = [case for case in CASES if case.like == like and (world.K > 1 or "gain" not in case.options)]
        times = time_together(world, cases, args)
        if world.rank == 0:
            show(count, world, cases, times)


if __name__ == "__main__":
    main()
