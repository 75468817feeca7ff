"""What a step costs on many nodes, as formulas: the fused step, and the steps that it would replace.

A NODE has P RANKS of one worker each, which share its memory and its network adapter; M nodes have R = M P ranks.
Every rank owns one SEGMENT of the N parameters; the ranks of one place in all nodes are a RAIL. A WORD is one access
of four bytes. A message of b bytes keeps its sender busy for OVERHEAD, is there LATENCY + b / WIRE later, and keeps
its receiver busy for OVERHEAD (LogGP: Alexandrov, Ionescu, Schauser, Scheiman 1995); a node's messages go out one after
another, and come in one after another, both at once. The ranks of a node read and write MEMORY bytes per second
together, each its Pth part.

The fused step walks in CHUNKS, the same slice of every segment, WINDOW of them under way at once. For each chunk a
rank reduces its node's gradients over the M segments of its rail, sends M - 1 partial sums to their owners, finishes
its own segment (adds M partial sums, applies the rule), and publishes the new weights of all M to its node. DIRECT
sends every partial sum and every new weight straight to whom it is for, 2 (M - 1) messages; HALVING exchanges halves
with one partner after another, the nearest first, and doubles on the way back, 2 log2 M messages. Either way a node
sends 2 (M - 1) / M * 4 N bytes, whatever P is; no all-reduce between nodes can send less (Patarasuk and Yuan 2009).

Three things bound the step: the work of a rank, the wire of its node, and the way of a chunk from its first gradient
to its last published weight, of which WINDOW go on at once. docs/scaling.md has the formulas and the references.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WORD = 4  # bytes
CELL = 1024  # elements, of which segments are whole multiples
WINDOW = 4  # chunks
BUCKET = 25 * 2**20  # bytes: what the last all-reduce behind a backward pass carries


@dataclass(frozen=True)
class Machine:
    """A node and its network."""

    wire: float  # bytes/s, each way
    latency: float  # s
    overhead: float  # s for each end of a message
    memory: float  # bytes/s

    @property
    def message(self) -> float:
        """Seconds of a message of no length, end to end: the alpha of the formulas for collectives."""
        return self.latency + 2 * self.overhead


@dataclass(frozen=True)
class Job:
    """N parameters on M nodes of P ranks."""

    parameters: int
    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def segment(self) -> int:
        """Elements of the largest segment."""
        return CELL * math.ceil(self.parameters / (CELL * self.ranks))

    @property
    def filled(self) -> float:
        """The part of the ranks whose segments are not empty: below one where ranks are as many as cells."""
        return self.parameters / (self.ranks * self.segment)

    def sent(self, elements: float) -> float:
        """Bytes that a node's rails receive to reduce, or send to publish, `elements` of each of its own segments."""
        return WORD * self.ranks_per_node * (self.nodes - 1) * elements


def place(parameters: int, ranks: int, per_node: int) -> Job:
    """Whole nodes where the ranks fill one, else a part of one."""
    return Job(parameters, max(1, ranks // per_node), min(ranks, per_node))


# ---- words per element of a segment, on the rank that does the work ----

FINISH = 5  # weight and slot read and written, the new weight laid down for the wire
ADD = 3  # two partial sums read, one written


def partial_words(ranks_per_node: int) -> int:
    """Every gradient of the node read, their sum written."""
    return ranks_per_node + 1


def publish_words(ranks_per_node: int) -> int:
    """The new weight read and kept, every gradient read again, every rank's weight written."""
    return 2 * ranks_per_node + 2


def touch(job: Job, machine: Machine, words: float) -> float:
    """Seconds that one rank takes to read or write words."""
    return WORD * words * job.ranks_per_node / machine.memory


# ---- one chunk ----


@dataclass(frozen=True)
class Chunk:
    """Seconds of one chunk: of a rank's work, of the wire each way, of latencies, and of all when it is alone."""

    work: float
    wire: float
    latencies: float
    path: float

    def together(self, chunks: float, window: int) -> float:
        """Of so many chunks: what the ranks, the wires or the window allow, whichever is the longest."""
        return max(
            chunks * self.work + self.latencies,
            self.path + (chunks - 1) * self.wire,
            self.path + (chunks - 1) * self.path / window,
        )


def overlap(a: float, b: float, pieces: int) -> float:
    """Two stages of which the second may begin on a piece as soon as the first has done with it."""
    return max(a, b) + min(a, b) / pieces


def direct(job: Job, machine: Machine, chunk: float) -> Chunk:
    """Of a node whose segments are not empty. A rank's own needs no message: reduced last, published first."""
    m, p = job.nodes, job.ranks_per_node
    calls, half = (m - 1) * machine.overhead, job.sent(chunk) / machine.wire
    reduce = job.filled * (touch(job, machine, chunk * (m - 1) * partial_words(p)) + calls)
    finish = touch(job, machine, chunk * (m - 1 + FINISH)) + 2 * calls
    publish = job.filled * (touch(job, machine, chunk * (m - 1) * publish_words(p)) + calls)
    own_reduce, own_publish = touch(job, machine, chunk * p), touch(job, machine, chunk * 2 * p)
    there = max(reduce + own_reduce, overlap(reduce, half, m - 1) + machine.latency)
    back = max(publish + own_publish, overlap(half, publish, m - 1) + machine.latency)
    work = reduce + own_reduce + finish + publish + own_publish
    return Chunk(work, half * (1 + job.filled), 2 * machine.latency, there + finish + back)


def halving(job: Job, machine: Machine, chunk: float) -> Chunk:
    """For M = 2^a nodes. Nothing travels before all is reduced; weights are published while more come back."""
    m, p, rounds = job.nodes, job.ranks_per_node, job.nodes.bit_length() - 1
    held = chunk * job.filled  # empty segments have nothing to send
    calls, half = 4 * rounds * machine.overhead, job.sent(held) / machine.wire
    latencies = 2 * rounds * machine.latency
    reduce = touch(job, machine, held * m * partial_words(p))
    finish = touch(job, machine, held * (m - 1) * ADD + chunk * FINISH) + calls
    publish, own = touch(job, machine, held * (m - 1) * publish_words(p)), touch(job, machine, chunk * 2 * p)
    back = max(own + publish, half + publish * (m / 2) / (m - 1))
    path = reduce + half + finish + back + latencies
    return Chunk(reduce + finish + publish + own, 2 * half, latencies, path)


ALGORITHMS: dict[str, Callable[[Job, Machine, float], Chunk]] = {"direct": direct, "halving": halving}


def can_run(algorithm: str, nodes: int) -> bool:
    return algorithm != "halving" or nodes.bit_count() == 1


# ---- the fused step ----


def fused(
    job: Job, machine: Machine, algorithm: str = "direct", chunk: float | None = None, window: int = WINDOW
) -> float:
    """Seconds of a step; without `chunk`, in the chunks that suit it best."""
    if job.nodes == 1:
        return WORD * job.parameters * one_node_words(job.ranks_per_node) / machine.memory
    sizes = chunk_sizes(job.segment) if chunk is None else [min(chunk, job.segment)]
    return agreement(job, machine) + min(pipeline(job, machine, algorithm, size, window) for size in sizes)


def pipeline(job: Job, machine: Machine, algorithm: str, chunk: float, window: int) -> float:
    one = ALGORITHMS[algorithm](job, machine, chunk)
    return one.together(job.segment / chunk, window)


def agreement(job: Job, machine: Machine) -> float:
    """All ranks learn whether all are about to do the same: a small all-reduce, there and back."""
    return 2 * math.ceil(math.log2(job.ranks)) * machine.message if job.nodes > 1 else 0.0


def chunk_sizes(segment: int) -> list[int]:
    """Cells times powers of two, and the whole segment."""
    return [CELL << i for i in range((segment // CELL).bit_length()) if CELL << i < segment] + [segment]


def best_algorithm(job: Job, machine: Machine) -> str:
    able = [name for name in ALGORITHMS if can_run(name, job.nodes)]
    return min(able, key=lambda name: fused(job, machine, name))


def best_fused(job: Job, machine: Machine) -> float:
    return fused(job, machine, best_algorithm(job, machine))


def one_node_words(ranks: int) -> int:
    """One pass: a gradient is still in cache when it displaces the new weight."""
    return 2 * ranks + 4


# ---- the rivals: an all-reduce, the optimizer, the displacement ----
#
# Each has what is best for it: its all-reduce hides its own memory traffic behind the wire, or the wire behind it,
# pays no agreement, and copies nothing. UPDATE and DISPLACE are passes over memory that follow it.

UPDATE = 5  # gradient read, weight and slot read and written
DISPLACE = 3  # weight and gradient read, displaced weight written


def memory_pass(job: Job, machine: Machine, words: float) -> float:
    """Seconds that a node takes for so many words per parameter."""
    return WORD * job.parameters * words / machine.memory


def ring(job: Job, machine: Machine) -> float:
    """All R ranks in one ring, ordered by node, every rank updating all weights."""
    p, share = job.ranks_per_node, (job.ranks - 1) / job.ranks
    hop = machine.message if job.nodes > 1 else 2 * machine.overhead
    wire = 2 * share * WORD * job.parameters / machine.wire if job.nodes > 1 else 0.0
    all_reduce = 2 * (job.ranks - 1) * hop + max(wire, memory_pass(job, machine, UPDATE * p * share))
    return all_reduce + memory_pass(job, machine, (UPDATE + DISPLACE) * p)


def hierarchical(job: Job, machine: Machine) -> float:
    """Reduce in the node, all-reduce between nodes, broadcast in the node, every rank updating all weights."""
    return hierarchical_all_reduce(job, machine) + memory_pass(
        job, machine, (UPDATE + DISPLACE) * job.ranks_per_node
    )


def hierarchical_all_reduce(job: Job, machine: Machine) -> float:
    p, share = job.ranks_per_node, (job.nodes - 1) / job.nodes
    words = memory_pass(job, machine, 3 * p + 1 + (ADD + 2) * share)
    return min(ring_of_nodes(job, machine, words), tree_of_nodes(job, machine, words))


def ring_of_nodes(job: Job, machine: Machine, memory: float) -> float:
    """Patarasuk and Yuan 2009."""
    m = job.nodes
    wire = 2 * (m - 1) / m * WORD * job.parameters / machine.wire
    return 2 * (m - 1) * machine.message + max(wire, memory)


def tree_of_nodes(job: Job, machine: Machine, memory: float) -> float:
    """Rabenseifner's halving and doubling; nodes beyond a power of two first give all they have to a partner."""
    rounds = job.nodes.bit_length() - 1
    beyond = job.nodes > 1 << rounds
    whole = WORD * job.parameters / machine.wire
    wire = 2 * (1 - 2.0**-rounds) * whole + 2 * whole * beyond
    return 2 * (rounds + beyond) * machine.message + max(wire, memory)


def sharded(job: Job, machine: Machine) -> float:
    """As hierarchical, but the optimizer runs between reduce-scatter and all-gather, a shard on each rank."""
    update = UPDATE / job.nodes + DISPLACE * job.ranks_per_node
    return hierarchical_all_reduce(job, machine) + memory_pass(job, machine, update)


def overlapped(job: Job, machine: Machine, backward: float) -> float:
    """Messages hide behind `backward` seconds, all but the last bucket's: an all-reduce, or a reduce-scatter."""
    all_reduce = hierarchical_all_reduce(job, machine)
    plain = hierarchical(job, machine) - all_reduce + exposed(all_reduce, job, backward)
    shards = sharded(job, machine) - all_reduce / 2 + exposed(all_reduce / 2, job, backward)
    return min(plain, shards)


def exposed(seconds: float, job: Job, backward: float) -> float:
    last = min(1.0, BUCKET / (WORD * job.parameters))
    return max(seconds - backward, seconds * last)


RIVALS: dict[str, Callable[[Job, Machine], float]] = {
    "ring": ring,
    "hierarchical": hierarchical,
    "sharded": sharded,
}


# ---- training ----

BACKWARD = 2 / 3  # of the compute: a backward pass takes twice its forward pass


def steps(job: Job, machine: Machine, compute: float) -> dict[str, float]:
    """Seconds that each contestant adds to `compute` seconds of forward and backward."""
    rivals = {name: rival(job, machine) for name, rival in RIVALS.items()}
    fused_too = {"fused": best_fused(job, machine)}
    return fused_too | rivals | {"overlapped": overlapped(job, machine, BACKWARD * compute)}


def efficiency(compute: float, step: float) -> float:
    """The part of an iteration that is forward and backward."""
    return compute / (compute + step)
