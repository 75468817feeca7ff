"""The fused step between nodes as a discrete-event simulation: what model.py's formula leaves out, and luck.

A TASK is a piece of one rank's work. It is ready when all it waits for is there: other tasks of the rank, and
messages. A rank does one task at a time: of those ready first what other nodes wait for, then what belongs to the
oldest chunk. When a task ends, its messages queue at the node's adapter, which serves its ranks in turn, a whole
message at a time; its head arrives LATENCY after it began to leave, and it is there when the receiving adapter, too,
has taken it in after those that came before. `write_step` writes down the tasks; `Run` knows nothing of steps.

A chunk begins on a rank when the chunk WINDOW places before it has been published there.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from model import ADD, FINISH, WINDOW, WORD, Job, Machine, agreement, partial_words, publish_words, touch

Order = tuple[bool, int]  # whether it can wait, and the chunk; the least goes first


def urgent(chunk: int) -> Order:
    """Of what other nodes wait for."""
    return False, chunk


def patient(chunk: int) -> Order:
    return True, chunk


@dataclass(slots=True)
class Task:
    rank: int
    order: Order
    seconds: float
    waits: int = 0
    starts: list[int] = field(default_factory=list)  # tasks of the same rank
    sends: list[tuple[int, float]] = field(default_factory=list)  # the task that waits for it, and bytes


@dataclass(frozen=True)
class Outcome:
    seconds: float
    done: int  # tasks
    arrived: int  # messages
    sent: np.ndarray  # bytes by node


class Tasks:
    """The tasks of a step, while they are written down."""

    def __init__(self, job: Job, machine: Machine) -> None:
        self.job, self.machine, self.all = job, machine, list[Task]()

    def add(self, rank: int, order: Order, words: float, messages: int = 0) -> int:
        """A task that touches words, and sends and receives so many messages."""
        seconds = touch(self.job, self.machine, words) + messages * self.machine.overhead
        self.all.append(Task(rank, order, seconds))
        return len(self.all) - 1

    def follow(self, first: int, then: int) -> None:
        self.all[first].starts.append(then)
        self.all[then].waits += 1

    def message(self, source: int, target: int, elements: float) -> None:
        self.all[source].sends.append((target, WORD * elements))
        self.all[target].waits += 1

    def gates(self, chunk: int) -> list[int]:
        """A task of no length for every rank: the end of a chunk, and the beginning of one after it."""
        return [self.add(rank, patient(chunk), 0.0) for rank in range(self.job.ranks)]


Rail = list[tuple[int, int]]  # rank and gate, by node


def rail(job: Job, place: int, gates: Sequence[int]) -> Rail:
    return [(rank, gates[rank]) for rank in range(place, job.ranks, job.ranks_per_node)]


def write_direct_rail(tasks: Tasks, chunk: int, elements: int, begin: Rail, end: Rail) -> None:
    """Each node begins with the owner after itself, so that no owner hears from all at once."""
    m = tasks.job.nodes
    words, messages = elements * (m - 1 + FINISH), 2 * (m - 1)
    finish = [tasks.add(rank, urgent(chunk), words, messages) for rank, _ in begin]
    for node in range(m):
        write_partials(tasks, chunk, elements, node, begin[node], finish)
        write_publications(tasks, chunk, elements, node, finish[node], end)


def write_partials(
    tasks: Tasks, chunk: int, elements: int, node: int, begin: tuple[int, int], finish: Sequence[int]
) -> None:
    """What a node's rank of the rail reduces, the partial sum of its own segment last."""
    (rank, gate), p = begin, tasks.job.ranks_per_node
    for owner in after(node, tasks.job.nodes):
        partial = tasks.add(rank, patient(chunk), elements * partial_words(p), messages=1)
        tasks.follow(gate, partial)
        tasks.message(partial, finish[owner], elements)
    own = tasks.add(rank, patient(chunk), elements * p)
    tasks.follow(gate, own)
    tasks.follow(own, finish[node])


def write_publications(
    tasks: Tasks, chunk: int, elements: int, node: int, finish: int, end: Sequence[tuple[int, int]]
) -> None:
    """The segment that a node's rank has finished, published there and by its carriers."""
    (rank, gate), p = end[node], tasks.job.ranks_per_node
    own = tasks.add(rank, patient(chunk), elements * 2 * p)
    tasks.follow(finish, own)
    tasks.follow(own, gate)
    for node_of_carrier in after(node, tasks.job.nodes):
        carrier, gate = end[node_of_carrier]
        publish = tasks.add(carrier, patient(chunk), elements * publish_words(p), messages=1)
        tasks.message(finish, publish, elements)
        tasks.follow(publish, gate)


def after(node: int, nodes: int) -> list[int]:
    """The other nodes, in the order of a ring."""
    return [(node + i) % nodes for i in range(1, nodes)]


def write_halving_rail(tasks: Tasks, chunk: int, elements: int, begin: Rail, end: Rail) -> None:
    """In round i a node's partner is 2^i away and takes half of what the node still has; then all the way back."""
    m, p = tasks.job.nodes, tasks.job.ranks_per_node
    now = [gate for _, gate in begin]
    for _ in range(m):
        now = chain(tasks, patient(chunk), now, begin, elements * partial_words(p))
    rounds = range(m.bit_length() - 1)
    for i in rounds:
        half = elements * (m >> (i + 1))
        now = swap(tasks, chunk, now, 1 << i, half, begin, ADD * half)
    now = chain(tasks, urgent(chunk), now, begin, elements * FINISH)
    close(tasks, chain(tasks, patient(chunk), now, begin, elements * 2 * p), end)
    for i in reversed(rounds):
        segments = m >> (i + 1)
        now = swap(tasks, chunk, now, 1 << i, elements * segments, begin, 0.0)
        for _ in range(segments):
            close(tasks, chain(tasks, patient(chunk), now, begin, elements * publish_words(p)), end)


def swap(
    tasks: Tasks, chunk: int, now: Sequence[int], distance: int, elements: float, ranks: Rail, words: float
) -> list[int]:
    """Every node exchanges elements with the node at a distance, and goes on with a task of so many words."""
    then = chain(tasks, urgent(chunk), now, ranks, words, messages=2)
    for node, task in enumerate(now):
        tasks.message(task, then[node ^ distance], elements)
    return then


def chain(
    tasks: Tasks, order: Order, now: Sequence[int], ranks: Rail, words: float, messages: int = 0
) -> list[int]:
    """A task after each."""
    then = [tasks.add(rank, order, words, messages) for rank, _ in ranks]
    for first, second in zip(now, then, strict=True):
        tasks.follow(first, second)
    return then


def close(tasks: Tasks, last: Sequence[int], end: Rail) -> None:
    for task, (_, gate) in zip(last, end, strict=True):
        tasks.follow(task, gate)


# A chunk's tasks on one rail, between a row of gates and the next.
WRITERS: dict[str, Callable[[Tasks, int, int, Rail, Rail], None]] = {
    "direct": write_direct_rail,
    "halving": write_halving_rail,
}


def write_step(job: Job, machine: Machine, algorithm: str, chunk: int, window: int) -> list[Task]:
    tasks = Tasks(job, machine)
    ends: list[list[int]] = []
    for number, elements in enumerate(pieces(job.segment, chunk)):
        begin = ends[number - window] if number >= window else tasks.gates(number)
        ends.append(tasks.gates(number))
        for place in range(job.ranks_per_node):
            rails = rail(job, place, begin), rail(job, place, ends[-1])
            WRITERS[algorithm](tasks, number, elements, *rails)
    return tasks.all


def pieces(segment: int, chunk: int) -> list[int]:
    return [min(chunk, segment - start) for start in range(0, segment, chunk)]


# ---- running ----


class Run:
    """The state of one simulation. An event is (time, number, what, argument); numbers keep ties in order."""

    def __init__(self, tasks: list[Task], job: Job, machine: Machine, slowness: Sequence[float]) -> None:
        self.tasks, self.machine, self.slowness = tasks, machine, slowness
        self.per_node = job.ranks_per_node
        self.waits = [task.waits for task in tasks]
        self.ready: list[list[tuple[Order, int]]] = [[] for _ in range(job.ranks)]
        self.busy = [False] * job.ranks
        self.queues: list[deque[tuple[int, float]]] = [deque() for _ in range(job.ranks)]
        self.sending = [False] * job.nodes
        self.in_free = [0.0] * job.nodes
        self.sent = np.zeros(job.nodes)
        self.events: list[tuple[float, int, Callable[..., None], tuple[float, ...]]] = []
        self.now, self.numbers, self.done, self.arrived = 0.0, 0, 0, 0

    def at(self, time: float, what: Callable[..., None], *arguments: float) -> None:
        self.numbers += 1
        heapq.heappush(self.events, (time, self.numbers, what, arguments))

    def run(self) -> Outcome:
        for number, waits in enumerate(self.waits):
            if not waits:
                self.make_ready(number)
        while self.events:
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
        return Outcome(self.now, self.done, self.arrived, self.sent)

    def make_ready(self, number: int) -> None:
        task = self.tasks[number]
        heapq.heappush(self.ready[task.rank], (task.order, number))
        if not self.busy[task.rank]:
            self.busy[task.rank] = True
            self.at(self.now, self.begin, task.rank)

    def begin(self, rank: int) -> None:
        if not self.ready[rank]:
            self.busy[rank] = False
            return
        _, number = heapq.heappop(self.ready[rank])
        self.at(self.now + self.tasks[number].seconds * self.slowness[rank], self.end, number)

    def end(self, number: int) -> None:
        task = self.tasks[number]
        self.done += 1
        for then in task.starts:
            self.release(then)
        self.queues[task.rank].extend(task.sends)
        if task.sends and not self.sending[task.rank // self.per_node]:
            self.leave(task.rank)
        self.begin(task.rank)

    def release(self, number: int) -> None:
        self.waits[number] -= 1
        if not self.waits[number]:
            self.make_ready(number)

    def leave(self, last: int) -> None:
        """The adapter takes the next message after one of rank `last`'s: one of each rank in turn."""
        node, place = divmod(last, self.per_node)
        turns = (node * self.per_node + (place + i) % self.per_node for i in range(1, self.per_node + 1))
        rank = next((rank for rank in turns if self.queues[rank]), None)
        self.sending[node] = rank is not None
        if rank is None:
            return
        target, size = self.queues[rank].popleft()
        self.sent[node] += size
        self.at(self.now + self.machine.latency, self.head_arrives, target, size)
        self.at(self.now + size / self.machine.wire, self.leave, rank)

    def head_arrives(self, target: int, size: float) -> None:
        node = self.tasks[target].rank // self.per_node
        self.in_free[node] = max(self.now, self.in_free[node]) + size / self.machine.wire
        self.at(self.in_free[node], self.arrive, target)

    def arrive(self, target: int) -> None:
        self.arrived += 1
        self.release(target)


def simulate(
    job: Job,
    machine: Machine,
    algorithm: str,
    chunk: int,
    window: int = WINDOW,
    late: Sequence[float] = (),
    slowness: Sequence[float] = (),
) -> Outcome:
    """A step to which rank r comes `late[r]` seconds late, and works `slowness[r]` times as long as it should.

    No rank begins before all have come and agreed.
    """
    run = Run(write_step(job, machine, algorithm, chunk, window), job, machine, slowness or [1.0] * job.ranks)
    run.now = max(late, default=0.0) + agreement(job, machine)
    return run.run()
