"""A Slurm cluster on the hosts of hosts.py: `with Hosts(2) as hosts: slurm = Slurm(hosts); slurm.sbatch("job.sh")`.

The controller runs on the head, one slurmd on every node, each with a munged of its own; all of them end with their
hosts. Needed are the programs of Debian's `slurm-wlm` and `munge`; no service needs to be set up, and nothing outside
the hosts' folder is read or written. Tasks are neither bound nor confined to cgroups, which containers do not lend.

    python tests/clusters/slurm.py srun --mpi=pmi2 -n 2 python examples/digits.py     # one command on a new cluster
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from hosts import PATIENCE, Hosts, HostsError

DAEMONS = ["munged", "slurmctld", "slurmd", "srun", "sbatch"]
CONFIGURATION = """
ClusterName=hosts
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={private}/munge.socket
SlurmctldPidFile={private}/slurmctld.pid
SlurmdPidFile={private}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={private}/state
SlurmdSpoolDir={private}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
NodeName=node[0-{last}] CPUs=4 CoresPerSocket=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP
"""


def missing_daemons():
    """Which of Slurm's programs are not installed."""
    return [name for name in DAEMONS if not shutil.which(name)]


class Slurm:
    """A running cluster; it ends with its hosts."""

    def __init__(self, hosts):
        self.hosts, self.folder = hosts, hosts.folder / "slurm"
        self.folder.mkdir()
        private = hosts.folder / "tmp"
        text = CONFIGURATION.format(folder=self.folder, private=private, last=len(hosts.names) - 1)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = hosts.environment({"SLURM_CONF": str(self.folder / "slurm.conf")})
        munged = (
            f"munged --force --key-file={key} --socket={private}/munge.socket --pid-file={private}/munge.pid"
        )
        munged += f" --log-file={private}/munge.log --seed-file={private}/munge.seed"
        self.on_head(f"mkdir {private}/state && {munged} && slurmctld")
        for index in sorted(hosts.alive):
            hosts.run(
                index, f"mkdir {private}/spool && {munged} && SLURM_CONF={self.folder}/slurm.conf slurmd"
            )
        self._wait_until_idle()

    def on_head(self, script, timeout=PATIENCE):
        """(exit code, output) of a shell script on the head, with Slurm's commands at hand."""
        try:
            done = subprocess.run(
                self.hosts.on_head('cd "$0" && eval "$1"', Path.cwd(), script),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as late:
            raise HostsError(f"{script} took more than {timeout:g} s: {late.output}") from None
        return done.returncode, done.stdout

    def srun(self, command, timeout=100.0):
        """(exit code, output) of a job step."""
        return self.on_head(f"srun {command}", timeout)

    def sbatch(self, options, timeout=60.0):
        """(exit code, output) of a batch job, when it has ended."""
        log = self.folder / f"batch-{time.monotonic_ns()}.log"
        code, said = self.on_head(f"sbatch --parsable --output={log} {options}")
        if code:
            return code, said
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            _, job = self.on_head(f"scontrol show job {said.strip()}")
            if not re.search("JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING)", job):
                return int(re.search(r"ExitCode=(\d+)", job)[1]), log.read_text() if log.exists() else job
            time.sleep(0.1)  # sbatch --wait would look every ten seconds
        self.on_head(f"scancel --signal=KILL {said.strip()}")
        raise HostsError(f"the batch job took more than {timeout:g} s: {log.read_text()}")

    def _wait_until_idle(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            code, states = self.on_head("sinfo --noheader --Node --format=%t")
            if code == 0 and states.split() == ["idle"] * len(self.hosts.names):
                return
            if time.monotonic() > deadline:
                raise HostsError(f"Slurm's nodes did not come up: {states}")
            time.sleep(0.1)


def main():
    if missing := missing_daemons():
        sys.exit(f"slurm.py: {', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
    with Hosts(2) as hosts:
        code, output = Slurm(hosts).on_head(" ".join(sys.argv[1:]), timeout=600.0)
    print(output, end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
