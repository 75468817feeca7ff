"""What an engine costs in memory, by the kernel's count of proportional pages."""

import gc
from pathlib import Path

import numpy as np
import pytest

import extrapcomm as xc

ELEMENTS = 4_000_000


def proportional_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not count proportional pages")


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_is_weights_gradients_and_this_ranks_share_of_the_rest(worlds, workers):
    world = worlds(workers)
    gc.collect()
    world.comm.Barrier()
    before = proportional_bytes()
    engine = xc.Engine(world, np.zeros(ELEMENTS, np.float32), momentum=0.9, extrapolation="local")
    for worker in engine.workers:
        worker.grads[:] = 1
    engine.step()
    gc.collect()
    world.comm.Barrier()
    grown = proportional_bytes() - before
    world.comm.Barrier()
    both = 2 * 4 * ELEMENTS
    share = workers / world.K
    assert grown <= workers * both + 2 * 4 * ELEMENTS * share + 16e6
    assert grown >= workers * both
    engine.close()


def test_memory_goes_when_engine_and_views_go(world):
    def make_and_drop():
        engine = xc.Engine(world, np.zeros(ELEMENTS, np.float32))
        engine.step()
        engine.close()

    make_and_drop()
    gc.collect()
    world.comm.Barrier()
    before = proportional_bytes()
    for _ in range(3):
        make_and_drop()
    gc.collect()
    world.comm.Barrier()
    assert proportional_bytes() - before < 8e6


def test_views_outlive_their_engine(world):
    engine = xc.Engine(world, np.arange(100.0))
    view = engine.weights
    engine.close()
    del engine
    gc.collect()
    assert view.tolist() == list(range(100))
