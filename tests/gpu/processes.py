"""Rows: two processes on one GPU, ordered by events or by words that kernels or streams await; and one that is late.

    processes.py event|spin|memop        the bits of one process with two workers
    processes.py absent                  a rank whose host does not come to the step
    processes.py late|late-memop         a rank whose GPU does not come to an end with its work

The ranks meet in a folder, so that no MPI is needed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import LENGTHS, on_the_cpu, place, require, require_gpu, skip
from store_world import Store, StoreWorld

import extrapcomm as xc

RANKS = 2
STEPS = 5
LIMIT = 100.0  # seconds for the ranks
PATIENCE = 3.0  # seconds that a rank waits for one that is late
CYCLES = 60_000_000_000  # on the GPU: half a minute or so
SYNC = {"spin": "spin", "memop": "memop", "late": "spin", "late-memop": "memop"}  # other manners: event
LATE = ("absent", "late", "late-memop")
OPTIONS = {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "extrapolation": "local", "inner_lr": 0.05}


def main(manner: str) -> int:
    require_gpu()
    sync = SYNC.get(manner, "event")
    if place() == "cpu" and sync != "event":
        skip("the host's device has no queue")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XC_GPU_SYNC": sync, "CUDA_MODULE_LOADING": "EAGER"}
        command = [sys.executable, __file__, manner, folder]
        ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(RANKS)]
        codes = wait_for(ranks)
    require(codes == [0] * RANKS, f"the ranks ended with {codes}")
    print(told(manner))
    return 0


def wait_for(ranks: list[subprocess.Popen]) -> list[int | None]:
    """Their exit codes; past the limit they are killed."""
    deadline = time.monotonic() + LIMIT
    try:
        for rank in ranks:
            rank.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"ranks were killed after {LIMIT:.0f} s")
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.wait() for rank in ranks]


def told(manner: str) -> str:
    if manner in LATE:
        return f"PeerError within {PATIENCE:.0f} s and a little"
    return f"{STEPS} steps of {RANKS} processes, the bits of one with {RANKS} workers"


def be_rank(manner: str, folder: str, rank: int) -> int:
    limits = {"step_timeout": PATIENCE, "pass_timeout": PATIENCE} if manner in LATE else {}
    with StoreWorld(Store(Path(folder), rank, RANKS), **limits) as world:
        require(world.local_rank == rank, "the ranks of one host are counted wrongly")
        engine = xc.Engine(world, [w.to(place()) for w in values(0)], **OPTIONS)
        {"absent": be_absent, "late": be_late, "late-memop": be_late}.get(manner, train)(engine, rank)
    return 0


def values(seed: int) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.normal(size=n).astype(np.float32)) for n in LENGTHS]


def fill(grads: list[torch.Tensor], step: int, worker: int) -> None:
    for grad, its in zip(grads, values(1 + RANKS * step + worker), strict=True):
        grad.copy_(its)


def train(engine: xc.Engine, rank: int) -> None:
    """Beside an engine on the CPU that has both workers."""
    world = StoreWorld(workers=RANKS)
    with on_the_cpu():
        alone = xc.Engine(world, values(0), **OPTIONS)
    for step in range(STEPS):
        fill(engine.grads, step, rank)
        for v, worker in enumerate(alone.workers):
            fill(worker.grads, step, v)
        engine.step()
        alone.step()
    for mine, its in zip(engine.weights, alone.workers[rank].weights, strict=True):
        require(torch.equal(mine.cpu(), its), f"rank {rank}: published weights differ")
    for mine, its in zip(engine.master(), alone.master(), strict=True):
        require(np.array_equal(mine, its), f"rank {rank}: master weights differ")
    engine.step()  # the ranks leave together
    alone.close()
    world.close()


def be_absent(engine: xc.Engine, rank: int) -> None:
    """Rank 1 sleeps instead of stepping."""
    if rank == 1:
        time.sleep(3 * PATIENCE)
        return
    require_late(engine.step)


def be_late(engine: xc.Engine, rank: int) -> None:
    """Rank 1's GPU is busy when the step begins."""
    engine.step()
    if rank == 1:
        torch.cuda._sleep(CYCLES)
        engine.step()
        os._exit(0)  # it does not wait for its GPU
    engine.step()
    require_late(engine.master)
    os._exit(0)


def require_late(call) -> None:
    since = time.monotonic()
    try:
        call()
    except xc.PeerError as error:
        require(error.rank == 1, f"the wrong rank was blamed: {error}")
    else:
        raise AssertionError("nobody complained")
    seconds = time.monotonic() - since
    require(seconds < 5 * PATIENCE, f"it took {seconds:.1f} s to say so")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    sys.exit(be_rank(sys.argv[1], sys.argv[2], int(sys.argv[3])))
