"""Several hosts on one machine, for tests: `with Hosts(2) as hosts: hosts.mpirun(2, sys.executable, "train.py")`.

A host is a set of Linux namespaces: its own name, processes, shared memory, /dev/shm and network; files are shared, as
they are on a cluster. Every host has two networks. `mgmt` is for the launcher and is never disturbed; `eth0` is where
MPI's data go: its bytes are counted, its rate, delay and loss can be set and its cable pulled. A further host, `head`,
is where mpirun runs and both switches stand; it does no work.

    head ──┬── switch mgmt ──── node0.mgmt, node1.mgmt, ...
           └── switch data ──── node0.eth0, node1.eth0, ...

All hosts live in the process namespace of the head, whose first process ends when its input does. So however a test
ends, the kernel ends every process of every host and removes their networks and mounts; nothing is left to clean up.

    python tests/clusters/hosts.py --ranks 2 2 --rate 1gbit -- python benchmarks/step.py -b 40M -e 40M
"""

import argparse
import contextlib
import fcntl
import functools
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NAMESPACES = ["--net", "--uts", "--ipc", "--pid", "--mount"]
TOOLS = ["ip", "tc", "nsenter", "unshare"]
PREFIX = "extrapcomm-hosts-"
PATIENCE = 20.0  # seconds for anything but a job


@functools.cache
def reason_against():
    """Why there can be no hosts here, or None."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux)"
    trial = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, timeout=PATIENCE)
    return None if trial.returncode == 0 else f"needs namespaces: {trial.stderr.decode().strip()}"


def mpi_is_open_mpi():
    """Whether the mpirun on PATH is Open MPI's rather than MPICH's."""
    command, environment = (
        ["mpirun", "--version"],
        dict(os.environ),
    )  # not what an MPI above adds behind Python's back
    version = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return "Open MPI" in version.stdout


@dataclass
class Ended:
    """What came of a job."""

    code: int
    output: str
    seconds: float


class HostsError(Exception):
    """The hosts could not do what was asked; their own words."""


class Host:
    """A set of namespaces and its first process, which lives as long as we do."""

    def __init__(self, name, folder, within=()):
        self.name = name
        command = ["unshare", *NAMESPACES, "--fork", HERE / "host.sh", name, folder]
        self.process = piped([*within, *command])
        said = line_of(self.process)
        if not said.isdigit():
            self.close()
            raise HostsError(f"{name} did not start: {said}")
        self.first = int(said)
        (folder / name).write_text(said)

    def close(self):
        """Ends every process of the host and waits for that."""
        end_of_input(self.process)


def piped(command, **options):
    """A process that ends when we close its input, or end ourselves."""
    return subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
    )


def line_of(process):
    """The first line that a process prints; empty if it does not in time."""
    readable, _, _ = select.select([process.stdout], [], [], PATIENCE)
    return process.stdout.readline().decode().strip() if readable else ""


def end_of_input(process):
    process.stdin.close()
    process.stdout.close()
    process.wait(PATIENCE)


class Job:
    """An mpirun that is running. Its output goes to a file, so that it can be looked at meanwhile.

    What a rank appends to the file $EXTRAPCOMM_TEST_REPORT stands before the rest: launchers forward nothing more once
    they have lost a host.
    """

    def __init__(self, hosts, command, environment):
        self.hosts, self.since = hosts, time.monotonic()
        self.report, self.log = (hosts.folder / f"job-{len(hosts.jobs)}.{kind}" for kind in ("report", "log"))
        self.report.touch()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**environment, "EXTRAPCOMM_TEST_REPORT": str(self.report)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self):
        return "".join(file.read_text(errors="replace") for file in (self.report, self.log))

    def wait(self, timeout=60.0):
        """Ended, when the job has; TimeoutError, when it takes longer, and then every process of it is killed."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise TimeoutError(
                f"the job did not end in {timeout:g} s; so far it said:\n{self.output}"
            ) from None
        return Ended(code, self.output, time.monotonic() - self.since)

    def wait_for(self, text, times=1, timeout=30.0):
        """Returns as soon as the job's output has the text so many times."""
        deadline = time.monotonic() + timeout
        while True:
            over = time.monotonic() > deadline or self.process.poll() is not None
            if self.output.count(text) >= times:
                return
            if over:
                self.end()
                raise TimeoutError(f"the job did not say {text!r}; it said:\n{self.output}")
            time.sleep(0.02)

    def end(self):
        """Kills mpirun and whatever runs on the hosts but their first processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for index in sorted(self.hosts.alive):
            self.hosts.run(index, "kill -9 -1", check=False)


def locked_folder():
    """(path, lock): a folder that is known to be in use as long as the lock is open."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = (folder / "new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")
    return folder, lock


def remove_stale_folders():
    """Those of processes that were killed; hosts have nothing else that outlives them."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)


class Hosts:
    """So many hosts, `node0` and on, with a switched network between them; a context manager."""

    def __init__(self, count=2):
        self.names = [f"node{i}" for i in range(count)]
        self.alive = set(range(count))
        remove_stale_folders()
        self.folder, self.lock = locked_folder()
        self.jobs, self.wire = [], None
        self.head, self.nodes = None, []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends every job and every host."""
        if self.head is not None:
            self.head.close()  # the kernel kills the nodes, the wire and the jobs with it
        for process in [*(node.process for node in self.nodes), *filter(None, [self.wire])]:
            end_of_input(process)
        for job in self.jobs:
            job.process.wait(PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()

    # ---- the network ----

    def shape(self, rate=None, delay=0.0, loss=0.0):
        """Sets every data link, both directions: what is not given is as good as this machine makes it.

        Args:
            rate: as tc spells it ("1gbit", "100mbit"), or None.
            delay: seconds from host to host; a round trip takes twice as long.
            loss: the part of all frames that is lost, 0.01 for one in a hundred.
        """
        for index in sorted(self.alive):
            self.run(index, _rated("eth0", rate))
            # Frames of the size that the wire loses one by one, not the 64 KB that a virtual cable takes.
            self.run(index, f"ip link set eth0 gso_max_segs {1 if loss else 65535}")
            self._head(_rated(f"data{index}", rate))
        self._set_wire(delay, loss)

    def link_down(self, index):
        """Pulls the cable of a host's data network."""
        self._head(f"ip link set data{index} down")

    def link_up(self, index):
        self._head(f"ip link set data{index} up")

    def bytes_sent(self, index):
        """What left a host's data interface since it was made, headers included."""
        return self._counters(index)[8]

    def bytes_received(self, index):
        return self._counters(index)[0]

    # ---- processes ----

    def run(self, index, command, *, check=True, timeout=PATIENCE):
        """The output of a shell command on a host; HostsError if it fails."""
        entered = shlex.join([str(HERE / "enter.sh"), self.names[index], command])
        return self._head(entered, check=check, timeout=timeout)

    def running(self, index):
        """The names of the programs that run on a host."""
        return self.run(index, "cat /proc/[0-9]*/comm 2>/dev/null || true").split()

    def start(self, ranks, *command, options=(), env=None):
        """A Job: mpirun, on the head, of a command on the hosts.

        Args:
            ranks: how many on each host, or a list with one number for each.
            command: what every rank runs.
            options: further options of mpirun.
            env: further environment variables.
        """
        counts = [ranks] * len(self.names) if isinstance(ranks, int) else list(ranks)
        used = [(name, n) for name, n in zip(self.names, counts, strict=True) if n]
        launch = ["mpirun", *_placement(used), *options, *map(str, command)]
        command = self.on_head('cd "$0" && exec "$@"', Path.cwd(), *launch)
        job = Job(self, command, self.environment({**LAUNCHING, **(env or {})}))
        self.jobs.append(job)
        return job

    def mpirun(self, ranks, *command, options=(), env=None, timeout=60.0):
        """Ended: the code, output and seconds of a job that has `timeout` seconds; see `start`."""
        return self.start(ranks, *command, options=options, env=env).wait(timeout)

    def kill(self, index):
        """Ends every process of a host at once; its connections are closed. It does not come back."""
        self.alive.discard(index)
        self._head(f"kill -9 {self.nodes[index].first}")
        self.nodes[index].process.wait(PATIENCE)

    def cut_power(self, index):
        """The same, but nobody is told: connections stay open and no answers come."""
        self._head(f"ip link set mgmt{index} down && ip link set data{index} down")
        self.kill(index)

    # ---- what these are made of ----

    def _start(self):
        lines = [f"10.1.0.{i + 1} {name}" for i, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.1.0.254 head", *lines, ""]))
        (self.folder / "tmp").mkdir()
        self.head = Host("head", self.folder)
        # With an address of its own: else it is that of some port, and changes when that port's host is killed.
        self._head("ip link add mgmt address 02:00:00:00:00:fe type bridge")
        self._head("ip link add data type bridge && ip link set data up")
        self._head("ip address add 10.1.0.254/24 dev mgmt && ip link set mgmt up")
        for index, name in enumerate(self.names):
            self.nodes.append(Host(name, self.folder, self.on_head('exec "$@"', "sh")))
            self._plug(index, "mgmt", "mgmt", f"10.1.0.{index + 1}")
            self._plug(index, "data", "eth0", f"10.2.0.{index + 1}")

    def _plug(self, index, switch, interface, address):
        """A cable from a switch of the head to an interface of a host."""
        port = f"{switch}{index}"
        self._head(
            f"ip link add {port} master {switch} type veth peer {interface} netns {self.nodes[index].first}"
        )
        self._head(f"ip link set {port} up")
        self.run(index, f"ip address add {address}/24 dev {interface} && ip link set {interface} up")

    def _set_wire(self, delay, loss):
        if self.wire is not None:
            end_of_input(self.wire)
            self.wire = None
        ports = [f"data{index}" for index in sorted(self.alive)]
        switch = "nomaster" if delay or loss else "master data"
        self._head(" && ".join(f"ip link set {port} {switch}" for port in ports))
        if delay or loss:
            self.wire = self._started_wire(delay, loss, ports)

    def _started_wire(self, delay, loss, ports):
        command = self.on_head('exec "$@"', "sh", sys.executable, HERE / "wire.py", delay, loss, *ports)
        wire = piped(command)
        if (said := line_of(wire)) != "ready":
            end_of_input(wire)
            raise HostsError(f"the wire did not start: {said}")
        return wire

    def _counters(self, index):
        found = re.search(r"eth0:(.*)", self.run(index, "cat /proc/net/dev"))
        return [int(number) for number in found[1].split()]

    def on_head(self, script, *arguments):
        """The command that runs a shell script on the head."""
        enter = ["nsenter", "--target", self.head.first, "--net", "--uts", "--ipc", "--pid", "--mount"]
        return [str(word) for word in (*enter, "sh", "-c", script, *arguments)]

    def _head(self, script, *, check=True, timeout=PATIENCE):
        done = subprocess.run(
            self.on_head(script), capture_output=True, text=True, timeout=timeout, env=self.environment({})
        )
        if check and done.returncode:
            raise HostsError(f"{script}: {done.stderr.strip()}")
        return done.stdout

    def environment(self, more):
        """Ours, without what an mpirun above us or `make` may have set for launchers, with what MPI needs here."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        here = {"EXTRAPCOMM_HOSTS": str(self.folder), "TMPDIR": str(self.folder / "tmp")}
        return {**inherited, **SETTINGS, **here, **more}


LAUNCHERS = (
    "PMIX_",
    "OMPI_COMM",
    "PMI_",
    "PRTE_MCA_",
    "OMPI_MCA_rmaps",
    "OMPI_MCA_hwloc",
    "HYDRA_",
    "SLURM_",
)

# One MPI does not read the settings of the other. First what holds under any launcher, then what mpirun needs here.
SETTINGS = {
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_btl_tcp_if_include": "eth0",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # the hosts share one set of cores, of which MPI does not know
    "UCX_NET_DEVICES": "eth0",
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "eth0",
    "OMP_NUM_THREADS": "1",
}
LAUNCHING = {
    "PRTE_MCA_plm_ssh_agent": str(HERE / "enter.sh"),
    "PRTE_MCA_prte_if_include": "mgmt",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "HYDRA_LAUNCHER": "ssh",
    "HYDRA_LAUNCHER_EXEC": str(HERE / "enter.sh"),
    "HYDRA_IFACE": "mgmt",
}


def _placement(used):
    """mpirun's options for so many ranks on each of these hosts."""
    places, total = ",".join(f"{name}:{n}" for name, n in used), str(sum(n for _, n in used))
    if not mpi_is_open_mpi():
        return ["-hosts", places, "-n", total]
    return ["--host", places, "--map-by", "slot:nooversubscribe", "-n", total]


def _rated(interface, rate):
    """The shell command that sets an interface's rate."""
    if rate is None:
        return f"tc qdisc delete dev {interface} root 2>/dev/null || true"
    return f"tc qdisc replace dev {interface} root tbf rate {rate} burst 128kb latency 100ms"


def main():
    """Runs one command on new hosts and tells what each of them sent."""
    parser = argparse.ArgumentParser(
        description="Run a command under mpirun on several hosts of this machine."
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 2], help="of each host (default: 2 2)")
    parser.add_argument("--rate", help="of each link, as tc spells it: 1gbit")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds from host to host")
    parser.add_argument("--loss", type=float, default=0.0, help="part of all frames that is lost")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that the command may take")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args()
    if reason := reason_against():
        sys.exit(f"hosts.py: {reason}")
    with Hosts(len(options.ranks)) as hosts:
        hosts.shape(options.rate, options.delay, options.loss)
        done = hosts.mpirun(options.ranks, *options.command, timeout=options.limit)
        print(done.output, end="")
        for index, name in enumerate(hosts.names):
            print(f"{name}: sent {hosts.bytes_sent(index) / 1e6:.3f} MB")
    return done.code


if __name__ == "__main__":
    sys.exit(main())
