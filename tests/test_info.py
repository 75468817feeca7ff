"""What `python -m extrapcomm info` says, and when it warns."""

import json
import os
import re

import pytest
from conftest import COMM
from mpi4py import MPI

import extrapcomm as xc
from extrapcomm.__main__ import main, warnings_about
from extrapcomm.launch import (
    cores_allowed,
    cores_here,
    launcher_size,
    memory_domains,
    require_launchers_mpi,
    singleton_warning,
)
from extrapcomm.placement import placement_warnings


def test_info_names_mpi_build_and_every_rank(capfd):
    assert main(["info", "--json"]) == 0
    printed = capfd.readouterr().out
    if COMM.rank:
        assert printed == ""
        return
    facts = json.loads(printed)
    assert [member["rank"] for member in facts["team"]] == list(range(COMM.size))
    assert all(member["cores"] for member in facts["team"])
    assert facts["build"]["store_bytes"] in ("16", "32", "64")
    assert facts["mpi"] and facts["build"]["instruction_set"] and facts["packages"]["mpi4py"]
    assert facts["limits"]["memory_available"] > 0


def test_info_for_people_has_a_line_for_every_rank(capfd):
    assert main(["info"]) == 0
    printed = capfd.readouterr().out
    if COMM.rank == 0:
        assert all(f"rank {rank}:" in printed for rank in range(COMM.size))
        assert "MPI loaded" in printed and "/dev/shm" in printed


@pytest.fixture
def unlaunched(monkeypatch):
    """The environment without what any launcher may have put there."""
    for variable in os.environ:
        if variable.startswith(
            ("OMPI_COMM_WORLD_SIZE", "PMI_", "MV2_COMM_WORLD_SIZE", "SLURM_", "PALS_", "FLUX_")
        ):
            monkeypatch.delenv(variable)
    return monkeypatch


def test_fewer_ranks_than_the_launcher_started_are_warned_of(unlaunched):
    unlaunched.setenv("FLUX_JOB_SIZE", "4")
    assert launcher_size() == (4, "FLUX_JOB_SIZE")
    assert "MPI sees only 1, so they do not train together" in singleton_warning(1)
    assert singleton_warning(4) is None
    require_launchers_mpi(1, "an MPI")


@pytest.mark.parametrize(
    ("library", "remedy"),
    [
        ("Open MPI v5.0.11, package", "with its mpirun inside sbatch or salloc; srun can only where"),
        ("MPICH Version: 5.0.2", "with srun --mpi=pmi2, or with its mpirun"),
        ("another", "MPICH: pmi2; Open MPI: pmix"),
    ],
)
def test_singleton_under_srun_is_refused_with_the_way_to_start_this_mpi(unlaunched, library, remedy):
    unlaunched.setenv("SLURM_JOB_ID", "7")
    unlaunched.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(xc.UsageError, match=f"srun started 4 processes .*{remedy}.*COMM_SELF"):
        require_launchers_mpi(1, library)
    assert remedy in singleton_warning(1, library)
    unlaunched.setenv("PMI_SIZE", "4")
    unlaunched.setenv("PMI_JOBID", "7.0")
    with pytest.raises(xc.UsageError, match=f"srun --mpi=pmi2 started 4 processes .*{remedy}"):
        require_launchers_mpi(1, library)
    require_launchers_mpi(4, library)


def test_task_of_srun_that_has_the_terminal_to_itself_may_train_alone(unlaunched):
    unlaunched.setenv("SLURM_STEP_NUM_TASKS", "4")
    unlaunched.setenv("SLURM_PTY_PORT", "33787")
    require_launchers_mpi(1, "an MPI")
    assert "MPI sees only 1" in singleton_warning(1)


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"), ("PMI_SIZE", "the mpirun of MPICH")],
)
def test_singleton_under_another_mpis_launcher_is_refused(unlaunched, variable, launcher):
    unlaunched.setenv(variable, "4")
    with pytest.raises(xc.UsageError, match=f"{launcher}.* started 4 .*has loaded MPICH 5.0.*, which sees"):
        require_launchers_mpi(1, "MPICH 5.0, of some date\nand more\0")
    require_launchers_mpi(4, "an MPI")
    unlaunched.setenv(variable, "1")
    require_launchers_mpi(1, "an MPI")


def test_world_of_a_lost_singleton_must_be_asked_for(unlaunched):
    if COMM.size > 1:
        pytest.skip("an MPI that sees its peers is the launcher's")
    unlaunched.setenv("PMI_SIZE", "2")
    with pytest.raises(xc.UsageError, match=r"train alone .* World\(comm=MPI.COMM_SELF\)"):
        xc.World()
    xc.World(MPI.COMM_SELF).close()
    assert main(["info"]) == 0


def test_memory_limit_below_the_machines_is_warned_of():
    limits = {"cgroup_memory_max": 10**9, "memory_available": 10**10}
    facts = {"team": [place()], "limits": limits, "mpi": "an MPI", "gpus": [[]]}
    assert any("memory limit is 1.0 GB" in text for text in warnings_about(facts))


def place(cores=range(8), host="a", allowed=range(8), domains=(0,), threads=1):
    return {
        "host": host,
        "pid": 1,
        "cores": list(cores),
        "allowed": list(allowed),
        "domains": list(domains),
        "threads": threads,
    }


WELL = {
    "a rank alone": [place(threads=None)],
    "free ranks with few threads": [place(threads=2)] * 4,
    "a core for each": [place([core]) for core in range(8)],
    "disjoint halves": [place(range(4), threads=None), place(range(4, 8), threads=None)],
    "the same cores of two hosts": [place(host="a", threads=8), place(host="b", threads=8)],
}
ILL = {
    "5 ranks share 2 cores of a: .* start 2 there": [place([0, 1], allowed=[0, 1])] * 5,
    "2 ranks on a are bound to the core 3 while it has 8: .*--bind-to core": [
        place([3]),
        place([3]),
        place([1]),
    ],
    "3 ranks on b are bound to the cores 0-1 while": [place(), *[place([0, 1], "b")] * 3],
    "bound to one core each.* 6 cores are idle: .*PE=4": [place([0]), place([1])],
    "OMP_NUM_THREADS is not set, .*4 ranks on a .*32 threads on 8 cores: OMP_NUM_THREADS=2$": [
        place(threads=None)
    ]
    * 4,
    "OMP_NUM_THREADS is 8, .*16 threads on 8 cores: OMP_NUM_THREADS=4$": [place(threads=8)] * 2,
    "ranks on a may run in 2 NUMA domains.*--bind-to numa": [place(domains=[0, 1])] * 2,
}


@pytest.mark.parametrize("team", WELL.values(), ids=WELL)
def test_ranks_with_cores_enough_are_not_warned_of(team):
    assert placement_warnings(team) == []


@pytest.mark.parametrize(("text", "team"), ILL.items())
def test_ranks_that_get_into_each_others_way_are_warned_of(text, team):
    (warning,) = placement_warnings(team)
    assert re.search(text, warning), warning


def test_allowed_cores_are_found_without_changing_the_binding():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert set(cores_allowed()) >= before
        assert cores_here() == [min(before)]
    finally:
        os.sched_setaffinity(0, before)


def test_memory_domains_are_those_of_the_cores():
    assert memory_domains([]) == []
    assert len(memory_domains(cores_here())) <= len(cores_here())
