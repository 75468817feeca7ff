"""What `python -m extrapcomm info` says, and when it warns."""

import json

import pytest
from conftest import COMM
from mpi4py import MPI

import extrapcomm as xc
from extrapcomm.__main__ import main, warnings_about
from extrapcomm.launch import launcher_size, require_launchers_mpi, singleton_warning


def test_info_names_mpi_build_and_every_rank(capfd):
    assert main(["info", "--json"]) == 0
    printed = capfd.readouterr().out
    if COMM.rank:
        assert printed == ""
        return
    facts = json.loads(printed)
    assert [member["rank"] for member in facts["team"]] == list(range(COMM.size))
    assert all(member["cores"] for member in facts["team"])
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
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def test_singleton_under_a_task_manager_is_warned_of(unlaunched):
    unlaunched.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launcher_size() == (4, "SLURM_STEP_NUM_TASKS")
    assert "MPI sees only 1" in singleton_warning(1)
    assert singleton_warning(4) is None
    require_launchers_mpi(1, "an MPI")


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


def test_crowded_and_bound_ranks_are_warned_of():
    limits = {"cgroup_memory_max": 10**9, "memory_available": 10**10}
    crowded = {"team": [{"cores": [0, 1]}] * 3, "limits": limits}
    assert any("3 ranks share 2 cores" in text for text in warnings_about(crowded))
    assert any("memory limit is 1.0 GB" in text for text in warnings_about(crowded))
    bound = {"team": [{"cores": [0]}, {"cores": [1]}], "limits": limits}
    assert any("bound to one core" in text for text in warnings_about(bound))
