"""The part of writes through `.data`, for which torch counts no version, that the next step notices, and its cost.

    python benchmarks/written.py
    python benchmarks/written.py --steps 200 --seeds 10

A WGAN critic (3 layers, 17,025 parameters) is trained on random data. After each step its weights are clamped
(clipping of WGAN), every fifth step they are interpolated with slow weights (Lookahead), every twentieth a low-rank
product is added to one layer (merging LoRA); and, hard to notice, 16 elements of the largest layer are changed.
`changed` is the part of all elements that a write changed, on average over the writes that changed any; `noticed` is
the part of those writes that the next step refused; the last column is the number of writes.
The second table is the time of the comparison before a step and of the whole step.
"""

import argparse
import time
from collections.abc import Callable

import torch

import extrapcomm as xc

Model = torch.nn.Module
Write = Callable[[Model, int], None]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=100, help="of the model that is timed")
    parser.add_argument("--elements", type=int, default=10_000, help="of each of those tensors")
    return parser.parse_args()


def critic(seed: int) -> Model:
    torch.manual_seed(seed)
    sizes = (2, 128, 128, 1)
    layers: list[Model] = []
    for wide, narrow in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.LeakyReLU(0.2)]
    return torch.nn.Sequential(*layers[:-1])


def clamp(bound: float) -> Write:
    def write(model: Model, step: int) -> None:
        for p in model.parameters():
            p.data.clamp_(-bound, bound)

    return write


def lookahead(model: Model) -> Write:
    slow = [p.detach().clone() for p in model.parameters()]

    def write(model: Model, step: int) -> None:
        if step % 5 == 4:
            for p, w in zip(model.parameters(), slow, strict=True):
                w += 0.5 * (p.detach() - w)
                p.data.copy_(w)

    return write


def merge(model: Model, step: int) -> None:
    if step % 20 == 19:
        weight = model[2].weight  # type: ignore[index]
        weight.data += 1e-3 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])


def few_elements(model: Model, step: int) -> None:
    flat = model[2].weight.data.view(-1)  # type: ignore[index]
    flat[torch.randint(len(flat), (16,))] += 1e-3


CASES: dict[str, Callable[[Model], Write]] = {
    "clamp to 0.01": lambda model: clamp(0.01),
    "clamp to 0.08": lambda model: clamp(0.08),
    "clamp to 0.1": lambda model: clamp(0.1),
    "clamp to 0.2": lambda model: clamp(0.2),
    "Lookahead": lookahead,
    "LoRA merge": lambda model: merge,
    "16 elements": lambda model: few_elements,
}


def backward(model: Model) -> None:
    real, fake = torch.randn(64, 2) + 2, torch.randn(64, 2)
    (model(fake).mean() - model(real).mean()).backward()


def noticed(opt: xc.Adam) -> bool:
    try:
        opt.step()
    except xc.UsageError:
        opt.adopt()
        return True
    return False


def rates(make: Callable[[Model], Write], steps: int, seed: int) -> list[tuple[float, bool]]:
    """For each write that changed something, the part of elements that it changed, and whether it was noticed."""
    model = critic(seed)
    opt, write = xc.Adam(model.parameters(), lr=5e-4), make(model)
    seen = []
    for step in range(steps):
        opt.zero_grad()
        backward(model)
        opt.step()
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        write(model, step)
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        if (part := (before != after).float().mean().item()) > 0:
            opt.zero_grad()
            seen.append((part, noticed(opt)))
    opt.close()
    return seen


def median_time(call: Callable[[], object], rounds: int = 300) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def costs(tensors: int, elements: int) -> None:
    params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
    opt = xc.SGD(params, lr=1e-3, momentum=0.9)
    for p in params:
        p.grad = torch.randn(elements)
    opt.step()
    calls: dict[str, Callable[[], object]] = {
        "sampled elements": lambda: opt._core.written(0),
        "versions, addresses, sampled elements": lambda: opt._binding.require_own_weights(everywhere=True),
        "members of the groups": lambda: opt._members.require_same(opt.param_groups),
        "the whole step": opt.step,
    }
    print(f"\n{tensors} tensors of {elements} elements, medians in microseconds")
    for name, call in calls.items():
        print(f"{name:40s} {1e6 * median_time(call):8.1f}")
    opt.close()


def main() -> None:
    chosen = options()
    print(f"{'write':16s} {'changed':>8s} {'noticed':>8s} {'writes':>7s}")
    for name, make in CASES.items():
        seen = [each for seed in range(chosen.seeds) for each in rates(make, chosen.steps, seed)]
        if not seen:
            print(f"{name:16s} {'-':>8s} {'-':>8s} {0:7d}")
            continue
        parts, hits = zip(*seen, strict=True)
        print(f"{name:16s} {sum(parts) / len(seen):8.2%} {sum(hits) / len(seen):8.1%} {len(seen):7d}")
    costs(chosen.tensors, chosen.elements)


if __name__ == "__main__":
    main()
