"""Steps on several hosts of one machine, made of network namespaces by tests/clusters/hosts.py; needs root."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests" / "clusters"))

from hosts import Hosts, reason_against  # noqa: E402


def measure_on_hosts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `scaling.py measure` finds on each number of hosts and ranks, at each rate."""
    if reason := reason_against():
        raise SystemExit(f"no hosts in network namespaces: {reason}")
    for count in args.hosts:
        with Hosts(count) as hosts:
            for ranks, rate in itertools.product(args.ranks_per_host, args.rate):
                hosts.shape(rate=rate, delay=1e-6 * args.delay)
                yield measured(hosts, ranks, args) | {"rate_bits": bits(rate)}


def bits(rate: str) -> float:
    """Per second, of a rate as tc spells it: the set rate, which short measurements on busy cores miss."""
    return float(rate[:-4]) * UNITS[rate[-4:]]


def measured(hosts: Hosts, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """All hosts measure at once, as they will step at once: they share the machine's memory."""
    path = Path(hosts.folder) / "measured.json"
    numbers = ["--parameters", str(args.parameters), "--rounds", str(args.rounds)]
    command = [sys.executable, HERE / "scaling.py", "measure", "-J", path, *numbers]
    ended = hosts.mpirun(ranks, *command, timeout=300)
    if ended.code:
        raise SystemExit(f"measuring on {len(hosts.names)} hosts failed:\n{ended.output}")
    print(f"{len(hosts.names)} hosts of {ranks}: {ended.output.strip()}", flush=True)
    return dict(json.loads(path.read_text()))
