"""Row: after some steps the device has the CPU's bits, for rules, displacements, types and numbers of workers."""

import sys
from functools import partial
from itertools import product

from common import DTYPES, KINDS, RULES, Twins, require_gpu

import extrapcomm as xc

WORKERS = (1, 2, 3, 4, 8)
STEPS = 3
SETTINGS = (
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True},
    {"max_grad_norm": 1e9, "skip_nonfinite": True},
)


def compare(name: str, workers: int, dtype: str, kind: str, **settings) -> int:
    """One pair of engines, some steps."""
    twins = Twins(workers, dtype, extrapolation=kind, inner_lr=0.05, seed=7, **RULES[name], **settings)
    for step in range(STEPS):
        twins.step(lr=RULES[name]["lr"] * (1 + step))
    twins.require_same_bits(f"{name}, {kind}, {dtype}, {workers} workers, {settings}")
    twins.close()
    return 1


def compare_gains() -> int:
    for lag in (0, 1):
        twins = Twins(4, "float32", rule="sgd", lr=0.1, momentum=0.9, gain=partial(xc.AdaScale, lag=lag))
        for _ in range(STEPS):
            twins.step()
        twins.require_same_bits(f"AdaScale, lag {lag}")
        twins.close()
    return 2


def main() -> int:
    require_gpu()
    fast = "--fast" in sys.argv
    workers = (1, 3, 8) if fast else WORKERS
    kinds = ("none", "local", "gaussian") if fast else KINDS
    count = sum(compare(*each) for each in product(RULES, workers, DTYPES, kinds))
    for name, dtype, settings in product(("SGD with Nesterov", "Adam", "LAMB"), DTYPES, SETTINGS):
        count += compare(name, 4, dtype, "local", **settings)
    count += compare_gains()
    print(f"{count} combinations, bit for bit; extrapcomm {xc.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
