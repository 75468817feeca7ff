"""Under a real Slurm: the batch scripts of examples/clusters train, and what srun starts alone is refused."""

import re
import sys

import pytest
from hosts import Hosts, mpi_is_open_mpi, reason_against
from slurm import Slurm, missing_daemons

MISSING = reason_against() or ", ".join(missing_daemons())
pytestmark = [
    pytest.mark.own_mpirun,
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm (Debian: slurm-wlm, munge): {MISSING}"),
]
SHORT = "--workers 2 --batch 8 --epochs 1"
# Those of UCX are too long for Slurm now and then, and ranks hang in MPI_Init: docs/clusters.md.
SHORT_ADDRESSES = "--export=ALL,MPIR_CVAR_CH4_NETMOD=ofi"


@pytest.fixture(scope="module")
def slurm():
    with Hosts(2) as hosts:
        yield Slurm(hosts)


def test_batch_script_of_this_mpi_trains_on_two_nodes(slurm):
    pytest.importorskip("sklearn")
    script = "openmpi" if mpi_is_open_mpi() else "mpich"
    options = f"--ntasks-per-node=1 --export=ALL,VENV={sys.prefix} examples/clusters/{script}.sbatch {SHORT}"
    code, output = slurm.sbatch(options, timeout=100)
    assert code == 0, output
    assert "rank 0: node0" in output and "rank 1: node1" in output and "WARNING" not in output
    assert re.search(r"digits: EXTRAP-SGD [0-9.]+ %.*\(4 workers", output), output


def test_ranks_that_srun_starts_alone_are_refused_and_told_how_to_start(slurm):
    make = f"{sys.executable} -c 'import extrapcomm as xc; xc.World()'"
    code, output = slurm.srun(f"-n 3 {make}")
    assert code != 0
    way = "with its mpirun inside sbatch or salloc" if mpi_is_open_mpi() else "srun --mpi=pmi2"
    assert len(re.findall(f"UsageError: srun started 3 processes .*{way}", output)) == 3, output


def test_info_warns_of_ranks_that_srun_starts_alone(slurm):
    code, output = slurm.srun(f"-N 2 -n 2 {sys.executable} -m extrapcomm info")
    assert (
        code == 0 and output.count("srun started 2 processes (SLURM_STEP_NUM_TASKS) but MPI sees only 1") == 2
    )


def test_srun_with_pmi2_starts_mpichs_ranks_on_all_nodes(slurm):
    if mpi_is_open_mpi():
        pytest.skip("MPICH's wheel speaks pmi2; Open MPI's does not")
    script = 'from mpi4py import MPI; print(f"{MPI.COMM_WORLD.size} ranks\\n", end="")'
    code, output = slurm.srun(f"--mpi=pmi2 -N 2 -n 4 {SHORT_ADDRESSES} {sys.executable} -c '{script}'")
    assert code == 0 and output.count("4 ranks") == 4, output
