"""The hosts that other tests run on: they start, carry what is counted, and keep to the rate, delay and loss asked for."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import COMM
from hosts import Hosts, HostsError, mpi_is_open_mpi, reason_against

pytestmark = [
    pytest.mark.skipif(COMM.size > 1, reason="starts its own mpirun; runs in the plain suite"),
    pytest.mark.skipif(
        reason_against() is not None, reason=f"no hosts in network namespaces: {reason_against()}"
    ),
]

ALLREDUCE = """
import os, sys, time
import numpy as np
from mpi4py import MPI

def sent():
    line = next(line for line in open("/proc/net/dev") if "eth0:" in line)
    return int(line.split(":")[1].split()[8])

comm, count = MPI.COMM_WORLD, int(sys.argv[1])
ones, total = np.ones(count, "float32"), np.empty(count, "float32")
comm.Allreduce(ones, total)
comm.Barrier()
before, since = sent(), time.monotonic()
comm.Allreduce(ones, total)
comm.Barrier()
assert (total == comm.size).all()
for rank in range(comm.size):
    comm.Barrier()
    if rank == comm.rank:
        print(f"{os.uname().nodename} {time.monotonic() - since:.4f} {sent() - before}", flush=True)
"""

# Sends so many bytes from one host to another over a socket of its own and prints the seconds it took.
SERVE = """
import socket, sys, time
server = socket.create_server(("10.2.0.1", 4000))
peer, _ = server.accept()
got, since = len(peer.recv(1 << 20)), time.monotonic()
while data := peer.recv(1 << 20):
    got += len(data)
print(got, time.monotonic() - since)
"""
SEND = """
import socket, sys
for attempt in range(100):
    try:
        peer = socket.create_connection(("10.2.0.1", 4000), timeout=20)
        break
    except ConnectionRefusedError:
        import time; time.sleep(0.02)
peer.sendall(bytes(int(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def hosts():
    with Hosts(2) as made:
        yield made


@pytest.fixture(autouse=True)
def unshaped(request):
    yield
    if "hosts" in request.fixturenames:
        request.getfixturevalue("hosts").shape()


def python(script, *arguments):
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


def whereabouts(hosts, ranks):
    done = hosts.mpirun(ranks, *python("import os; from mpi4py import MPI; print(MPI.COMM_WORLD.size, os.uname().nodename)"))
    assert done.code == 0, done.output
    return sorted(re.findall(r"(\d+) (node\d)", done.output))
