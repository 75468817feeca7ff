"""Communicators outlive their worlds: no message finds another communicator in the place of its own."""

import gc

import numpy as np
import pytest
from conftest import COMM
from mpi4py import MPI

import extrapcomm as xc

LIMITS = {"pass_timeout": 10.0, "step_timeout": 10.0}


@pytest.mark.skipif(COMM.size < 2, reason="needs two ranks")
@pytest.mark.parametrize("leaver", [0, COMM.size - 1])
def test_what_is_sent_to_a_rank_that_has_left_reaches_no_other_world(leaver):
    """Open MPI ended the job when the leaver's next communicator had the number of the one that it had freed."""
    world = xc.World(COMM, **LIMITS)
    if COMM.rank == leaver:
        world.close()
    COMM.Barrier()
    if COMM.rank != leaver:
        with pytest.raises((xc.PeerError, xc.CommError)):
            xc.Engine(world, [np.zeros(5, "float32")])
    COMM.Barrier()
    for _ in range(4):
        others = [xc.World(MPI.COMM_SELF, **LIMITS) for _ in range(3)]
        for other in others:
            other.close()
    world.close()
    COMM.Barrier()
    with xc.World(COMM, **LIMITS) as world:
        assert world.gather_words(str(world.rank)) == [str(rank) for rank in range(COMM.size)]


@pytest.mark.parametrize("ending", ["close", "drop"])
def test_a_communicator_is_freed_when_all_ranks_have_left(ending):
    world = xc.World(COMM, **LIMITS)
    comm = world.comm
    if ending == "close":
        world.close()
    del world
    gc.collect()
    xc.World(COMM, **LIMITS).close()
    assert comm == MPI.COMM_NULL


@pytest.mark.skipif(COMM.size < 2, reason="needs two ranks")
def test_a_communicator_stays_as_long_as_one_rank_is_in_it():
    world = xc.World(COMM, **LIMITS)
    comm = world.comm
    if COMM.rank == 0:
        world.close()
    xc.World(COMM, **LIMITS).close()
    assert comm != MPI.COMM_NULL
    world.close()
    xc.World(COMM, **LIMITS).close()
    assert comm == MPI.COMM_NULL


def test_worlds_one_after_the_other_need_no_more_communicators_than_mpi_has():
    for _ in range(300):
        with xc.World(COMM, **LIMITS):
            pass
