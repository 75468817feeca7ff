"""What an engine costs in memory, by the kernel's count of proportional pages."""

import contextlib
import gc
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TEAM

import extrapcomm as xc
from extrapcomm.launch import machine_limits

ELEMENTS = 4_000_000


def proportional_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not count proportional pages")


def between_teams(world):
    """What several teams cost each rank beside: master weights once for each team, and buffers of 16 MiB."""
    if not TEAM or world.size <= TEAM:
        return 0
    return 4 * ELEMENTS / TEAM + 2**24


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
    state = 4 * ELEMENTS * workers / world.K
    assert grown <= workers * both + 2 * state + between_teams(world) + 16e6
    assert grown >= workers * both
    engine.close()


def test_memory_goes_when_engine_and_views_go(world):
    weights = np.zeros(ELEMENTS, np.float32)  # not again in each round: the heap may keep what was freed

    def make_and_drop():
        engine = xc.Engine(world, weights)
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


@contextlib.contextmanager
def file_size_limit(limit):
    """Files of this process, those in memory too, may not grow beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_memory_that_the_machine_lacks_is_an_error_with_both_sizes(world):
    too_many = world.comm.bcast(machine_limits()["memory_available"] // 4)
    endless = np.broadcast_to(np.float32(0), too_many)
    with pytest.raises(xc.CommError, match=r"ranks together need \d+ MB .* machine has \d+ MB to give"):
        xc.Engine(world, endless)
    with pytest.raises(xc.CommError, match=r"ranks together need \d+ MB .* machine has \d+ MB to give"):
        xc.arena_array(8 * too_many, world=world)


def test_absurd_size_is_an_error_at_once(world):
    since = time.monotonic()
    with pytest.raises(xc.CommError, match=r"ranks together need \d+ MB"):
        xc.Engine(world, np.broadcast_to(np.float32(0), 10**12))
    assert time.monotonic() - since < 20


def test_memory_refused_to_one_rank_is_an_error_on_all_with_both_sizes(world):
    odd = world.rank == world.size - 1
    text = r"this rank needs \d+ MB of shared memory, of \d+ MB available .*File too large"
    with file_size_limit(2**20 if odd else resource.RLIM_INFINITY), pytest.raises(xc.CommError, match=text):
        xc.Engine(world, np.ones(ELEMENTS, np.float32))
    engine = xc.Engine(world, np.ones(ELEMENTS, np.float32))
    engine.step()
    engine.close()
