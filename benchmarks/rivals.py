"""The contestants: the fused step, the ways to do the same with other tools, and two yardsticks.

Each holds its own weights and working weights, reads the problem's gradients and leaves them intact, and
does one step per call of `step`. The rivals get every saving that their tools offer: the division by K is
folded into their learning rate, blocks are padded so that the plain all-gather serves, and the buffers that
MPI sees are made once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from problem import BETAS, EPS, LR, MOMENTUM, Problem

import extrapcomm as xc


class Contestant:
    def prepare(self) -> None:
        """What comes before a step and is not timed."""

    def gradients(self) -> Sequence[torch.Tensor]:
        """The rank's gradients where this contestant reads them."""
        return []

    def step(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the garbage collector does not."""


@runtime_checkable
class Solver(Protocol):
    """A contestant that makes the whole step, and so has results to check."""

    def master(self) -> torch.Tensor: ...
    def points(self) -> Sequence[torch.Tensor]: ...


class Fused(Contestant):
    """The engine: one collective."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        rule = {"rule": problem.rule, "lr": LR}
        rule |= {"betas": BETAS, "eps": EPS} if problem.rule == "adam" else {"momentum": MOMENTUM}
        displacement = {"extrapolation": "local" if problem.displaced else "none", "displacement": "raw"}
        self.engine = xc.Engine(world, problem.weights, inner_lr=problem.gamma, **displacement, **rule)
        for worker, g in zip(self.engine.workers, problem.grads, strict=True):
            worker.grads.copy_(g)

    def gradients(self) -> Sequence[torch.Tensor]:
        return [worker.grads for worker in self.engine.workers]

    def step(self) -> None:
        self.engine.step(lr=LR)

    def master(self) -> torch.Tensor:
        return torch.as_tensor(self.engine.master())

    def points(self) -> Sequence[torch.Tensor]:
        return [worker.weights for worker in self.engine.workers]

    def close(self) -> None:
        self.engine.close()


class Unfused(Fused):
    """The engine's own stages, each a pass of its own over the shared memory: what fusion alone is worth."""

    def step(self) -> None:
        unfused_step(self.engine)


def unfused_step(engine: xc.Engine) -> None:
    engine.step_unfused(lr=LR)


class Separate(Contestant):
    """Sum the gradients, torch's fused optimizer, extrapolate: three calls, each with its passes over memory."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        self.comm, self.grads = world.comm, problem.grads
        self.gamma = problem.gamma
        self.x = [problem.weights.clone() for _ in self.grads] if problem.displaced else []
        self.total = torch.zeros_like(problem.weights)
        self.weights = problem.weights.to(problem.master, copy=True)
        self.weights.grad = self.total.to(problem.master)
        self.optimizer = make_optimizer(self.weights, problem)

    def gradients(self) -> Sequence[torch.Tensor]:
        return self.grads

    def step(self) -> None:
        add_up(self.grads, self.total)
        self.reduce()
        self.optimizer.step()
        displace(self.weights, self.grads, self.x, self.gamma)

    def reduce(self) -> None:
        """`weights.grad` becomes the sum of `total` over the ranks."""
        raise NotImplementedError

    def master(self) -> torch.Tensor:
        return self.weights

    def points(self) -> Sequence[torch.Tensor]:
        return self.x or [self.weights]


class MpiTorch(Separate):
    """MPI's all-reduce."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        super().__init__(problem, world)
        self.buffer = self.total.numpy()

    def reduce(self) -> None:
        self.comm.Allreduce(MPI.IN_PLACE, self.buffer)


class GlooTorch(Separate):
    """torch.distributed's all-reduce over gloo; 16-bit gradients are summed in 16 bits, then widened."""

    def reduce(self) -> None:
        dist.all_reduce(self.total)
        if self.weights.grad is not self.total:
            self.weights.grad.copy_(self.total)


class DeepSpeedShm(Separate):
    """DeepSpeed's all-reduce in shared memory, and for Adam its optimizer for CPUs."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        super().__init__(problem, world)
        self.all_reduce = deepspeeds_all_reduce(world.comm)
        if problem.rule == "adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            numbers = {"lr": LR, "betas": BETAS, "eps": EPS * problem.all_workers}
            self.optimizer = DeepSpeedCPUAdam([self.weights], adamw_mode=False, **numbers)

    def reduce(self) -> None:
        self.all_reduce(self.total)


_loaded: list[Callable[[torch.Tensor], torch.Tensor]] = []  # once for the process


def deepspeeds_all_reduce(comm: MPI.Comm) -> Callable[[torch.Tensor], torch.Tensor]:
    """Collective: DeepSpeed compiles it when it is first used, on rank 0 here; its names in /dev/shm go at once."""
    if _loaded:
        return _loaded[0]
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    port = comm.bcast(str(os.getpid()))
    os.environ |= {"LOCAL_SIZE": str(comm.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(min(comm.size, 2)):
        if (comm.rank == 0) == (rank == 0):
            module = ShareMemCommBuilder().load(verbose=False)
        comm.Barrier()
    module.initialize(comm.size, comm.rank)
    comm.Barrier()
    for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*") if comm.rank == 0 else ():
        path.unlink()
    _loaded.append(torch.ops.deepspeed.inference_all_reduce_)
    return _loaded[0]


class MpiZero1(Contestant):
    """Reduce-scatter, update of the own block, all-gather, extrapolation: the optimizer state is sharded.

    Rank r owns block r of ceil(count / ranks) weights. The weights are padded to whole blocks, and the
    optimizer holds a view of the own one, so that the all-gather works in place.
    """

    def __init__(self, problem: Problem, world: xc.World) -> None:
        self.comm, self.grads, self.count = world.comm, problem.grads, problem.count
        self.gamma = problem.gamma
        self.x = [problem.weights.clone() for _ in self.grads] if problem.displaced else []
        self.total = self.grads[0] if len(self.grads) == 1 else torch.empty_like(self.grads[0])
        block = -(-problem.count // problem.ranks)
        self.counts = [min(block, max(0, problem.count - r * block)) for r in range(problem.ranks)]
        self.padded = torch.zeros(block * problem.ranks, dtype=problem.dtype)
        self.padded[: problem.count] = problem.weights
        self.own = self.padded[problem.rank * block : (problem.rank + 1) * block]
        self.own.grad = torch.zeros_like(self.own)
        self.optimizer = make_optimizer(self.own, problem)
        received = self.own.grad[: self.counts[problem.rank]]
        self.send, self.receive, self.gathered = (t.numpy() for t in (self.total, received, self.padded))

    def gradients(self) -> Sequence[torch.Tensor]:
        return self.grads

    def step(self) -> None:
        if self.total is not self.grads[0]:
            add_up(self.grads, self.total)
        self.comm.Reduce_scatter(self.send, self.receive, self.counts)
        self.optimizer.step()
        self.comm.Allgather(MPI.IN_PLACE, self.gathered)
        displace(self.master(), self.grads, self.x, self.gamma)

    def master(self) -> torch.Tensor:
        return self.padded[: self.count]

    def points(self) -> Sequence[torch.Tensor]:
        return self.x or [self.master()]


class MpiAllReduce(Contestant):
    """Yardstick: MPI's all-reduce of the gradient and nothing else."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        self.comm, self.source = world.comm, problem.grads[0].numpy()
        self.target = np.empty_like(self.source)

    def gradients(self) -> Sequence[torch.Tensor]:
        return [torch.from_numpy(self.source)]

    def step(self) -> None:
        self.comm.Allreduce(self.source, self.target)


class Memcpy(Contestant):
    """Yardstick: all ranks at once copy private memory, together reading and writing the floor's bytes."""

    def __init__(self, problem: Problem, world: xc.World) -> None:
        half = problem.floor_bytes // (2 * problem.ranks)
        self.source, self.target = np.ones(half, np.uint8), np.zeros(half, np.uint8)

    def step(self) -> None:
        np.copyto(self.target, self.source)


RIVALS = {
    "mpi_torch": MpiTorch,
    "gloo_torch": GlooTorch,
    "mpi_zero1": MpiZero1,
    "deepspeed_shm": DeepSpeedShm,
    "unfused": Unfused,
    "mpi_allreduce": MpiAllReduce,
}


def why_absent(rival: str, dtype: torch.dtype) -> str:
    """Why a rival cannot run, or nothing."""
    if rival.startswith("mpi") and dtype.itemsize == 2:
        return f"MPI cannot reduce {dtype_name(dtype)}"
    if rival == "deepspeed_shm":
        if dtype != torch.float32:
            return "written here for float32"
        if find_spec("deepspeed") is None or find_spec("ninja") is None:
            return "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed ninja"
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_optimizer(weights: torch.Tensor, problem: Problem) -> torch.optim.Optimizer:
    """Fed with the sum of the gradients, not their mean: SGD's learning rate, or Adam's epsilon, makes up for it."""
    if problem.rule == "adam":
        return torch.optim.Adam([weights], lr=LR, betas=BETAS, eps=EPS * problem.all_workers, fused=True)
    return torch.optim.SGD([weights], lr=LR / problem.all_workers, momentum=MOMENTUM, fused=True)


def add_up(grads: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The sum of one rank's gradients, which stay as they are."""
    if len(grads) == 1:
        out.copy_(grads[0])
        return
    torch.add(grads[0], grads[1], out=out)
    for g in grads[2:]:
        out.add_(g)


def displace(
    weights: torch.Tensor, grads: Sequence[torch.Tensor], out: Sequence[torch.Tensor], gamma: float
) -> None:
    """x_k = w - gamma * g_k for the rank's own workers; without places for them, nothing: the model has w."""
    for g, x in zip(grads, out, strict=False):
        torch.sub(weights, g, alpha=gamma, out=x)


def start_gloo(comm: MPI.Comm) -> None:
    """Join torch.distributed; the free port that rank 0 found travels by MPI."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = None
    if comm.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, comm.size, True, wait_for_workers=False)
    port = comm.bcast(store.port if store else None)
    store = store or dist.TCPStore("127.0.0.1", port, comm.size, False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
