"""Row: a step comes after what the caller queued on its stream before, and before what it queues there later."""

import sys

import torch
from common import Twins, place, require, require_gpu, skip

BUSY = 200_000_000  # cycles: a tenth of a second or so


def main() -> int:
    require_gpu()
    if place() == "cpu":
        skip("the host has no streams")
    twins = Twins(2, "float32", rule="sgd", lr=0.1, momentum=0.9, extrapolation="local")
    stream = torch.cuda.Stream()
    for _ in range(5):
        step_behind_work(twins, stream)
    torch.cuda.synchronize()
    twins.require_same_bits("steps on a stream of their own")
    twins.close()
    print("5 steps behind 0.1 s of work on a stream that is not the default one")
    return 0


def step_behind_work(twins: Twins, stream: torch.cuda.Stream) -> None:
    """Gradients arrive late on the stream, and what is read right behind the step is the new weights."""
    before = [g.clone() for worker in twins.device.workers for g in worker.grads]
    twins.fill()
    coming = [g.clone() for worker in twins.device.workers for g in worker.grads]
    grads = [g for worker in twins.device.workers for g in worker.grads]
    for grad, values in zip(grads, before, strict=True):
        grad.copy_(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        for grad, values in zip(grads, coming, strict=True):
            grad.copy_(values)
        twins.device.step()
        seen = [w.clone() for w in twins.device.weights]
    twins.cpu.step()
    stream.synchronize()
    for mine, its in zip(seen, twins.cpu.weights, strict=True):
        require(torch.equal(mine.cpu(), its), "the weights behind a step are not the step's")


if __name__ == "__main__":
    sys.exit(main())
