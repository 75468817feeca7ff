"""The plain collectives on arena arrays: their tree, their mean, their blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import WORKING, assert_same_bits, rounded, tree_mean, tree_sum

import extrapcomm as xc

LENGTHS = [0, 1, 1023, 1024, 1025, 5040]
REDUCE = {"sum": tree_sum, "mean": tree_mean}


def filled(world, length, dtype, seed=0):
    """An arena array with random values, and all workers' values."""
    random = np.random.default_rng(seed)
    array = xc.arena_array(length, dtype=dtype, world=world)
    values = as_stored(random.normal(size=(world.K, length)).astype(WORKING[dtype]), dtype)
    for view, mine in local(array, world, values):
        view[...] = mine
    return array, values


def local(array, world, of_all):
    first = world.rank * world.workers
    return zip(array.views, of_all[first : first + world.workers], strict=True)


def as_stored(values, dtype):
    """As elements of an arena array, in which NumPy sees bfloat16 as uint16."""
    values = rounded(values, dtype)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)


def as_numbers(stored, dtype):
    return (
        (stored.astype(np.uint32) << 16).view(np.float32)
        if dtype == "bfloat16"
        else stored.astype(WORKING[dtype])
    )


def reduced(stored, dtype, op):
    return as_stored(REDUCE[op](list(as_numbers(stored, dtype))), dtype)


@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", WORKING)
def test_all_reduce_gives_every_worker_the_tree(team, dtype, length, op):
    array, values = filled(team, length, dtype)
    xc.all_reduce(array, op=op)
    for view in array.views:
        assert_same_bits(view, reduced(values, dtype, op))
    array.close()


@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("dtype", WORKING)
def test_reduce_scatter_gives_every_worker_its_block_of_the_tree(team, dtype, op):
    array, values = filled(team, 5040, dtype)
    xc.reduce_scatter(array, op=op)
    wanted = reduced(values, dtype, op)
    for view, k in local(array, team, range(team.K)):
        assert_same_bits(view[array.block(k)], wanted[array.block(k)])
    array.close()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", WORKING)
def test_all_gather_joins_the_blocks(team, dtype, length):
    array, values = filled(team, length, dtype)
    xc.all_gather(array)
    wanted = np.empty_like(values[0])
    for k in range(team.K):
        wanted[array.block(k)] = values[k, array.block(k)]
    for view in array.views:
        assert_same_bits(view, wanted)
    array.close()


@pytest.mark.parametrize("dtype", WORKING)
def test_broadcast_gives_every_worker_the_roots_values(team, dtype):
    array, values = filled(team, 1025, dtype)
    for root in range(team.K):
        for view, mine in local(array, team, values):
            view[...] = mine
        xc.broadcast(array, root=root)
        for view in array.views:
            assert_same_bits(view, values[root])
    array.close()


@given(
    length=st.integers(0, 5000),
    K=st.integers(1, 9),
    dtype=st.sampled_from(sorted(WORKING)),
    op=st.sampled_from(sorted(REDUCE)),
)
def test_reduce_scatter_then_all_gather_is_all_reduce(virtual, length, K, dtype, op):
    array, values = filled(virtual(K), length, dtype)
    xc.reduce_scatter(array, op=op)
    xc.all_gather(array)
    for view in array.views:
        assert_same_bits(view, reduced(values, dtype, op))
    array.close()


def test_blocks_tile_the_array(team):
    for length in LENGTHS:
        array = xc.arena_array(length, world=team)
        owned = np.zeros(length, int)
        for k in range(team.K):
            owned[array.block(k)] += 1
        assert (owned == 1).all()
        if length % team.K == 0:
            assert all(np.arange(length)[array.block(k)].size == length // team.K for k in range(team.K))
        array.close()


def test_sums_of_small_integers_are_exact(team):
    array = xc.arena_array((30, 41), world=team)
    for view, k in local(array, team, range(team.K)):
        view[...] = np.arange(view.size).reshape(view.shape) + k
    xc.all_reduce(array)
    K = team.K
    wanted = K * np.arange(1230).reshape(30, 41) + K * (K - 1) // 2
    assert_same_bits(array.view, wanted.astype("float32"))
    array.close()


def test_unknown_operation_is_a_usage_error(team):
    array = xc.arena_array(3, world=team)
    with pytest.raises(xc.UsageError):
        xc.all_reduce(array, op="median")
    with pytest.raises(xc.UsageError):
        xc.broadcast(array, root=team.K)
    array.close()
