"""Row: an engine on CuPy's arrays has the bits of one on NumPy's."""

import sys
from importlib.util import find_spec

import numpy as np
from common import place, require, require_gpu, skip
from store_world import StoreWorld

import extrapcomm as xc

OPTIONS = {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "extrapolation": "local"}


def main() -> int:
    require_gpu()
    if place() == "cpu":
        skip("CuPy's arrays are on a GPU")
    if find_spec("cupy") is None:
        skip("cupy is not installed")
    import cupy

    world, random = StoreWorld(workers=2), np.random.default_rng(0)
    weights = random.normal(size=1500).astype(np.float32)
    engines = [xc.Engine(world, arrays, **OPTIONS) for arrays in (cupy.asarray(weights), weights)]
    for _ in range(3):
        for there, here in zip(*(engine.workers for engine in engines), strict=True):
            values = random.normal(size=1500).astype(np.float32)
            there.grads[...] = cupy.asarray(values)
            here.grads[...] = values
        for engine in engines:
            engine.step()
    for there, here in zip(*(engine.workers for engine in engines), strict=True):
        require(np.array_equal(cupy.asnumpy(there.weights), here.weights), "published weights differ")
    require(np.array_equal(*(engine.master() for engine in engines)), "master weights differ")
    print(f"3 steps of 2 workers on arrays of CuPy {cupy.__version__}, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
