"""Any shapes, types, groups, hyper-parameters, tiles, workers and missing gradients: the reference's bits.

The examples are the same on every rank, and ranks compare their verdicts on each, so that they shrink alike.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import COMM, loaded, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import WORKING, ReferenceEngine, assert_same_bits, rounded

import extrapcomm as xc

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

LISTED = xc._core.rules()
CLASSES = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam"}
KINDS = [
    (kind, extrapolation)
    for kind, rule in CLASSES.items()
    for extrapolation in ("none", "local", "global", "anisotropic")
]

rates = st.floats(0.001, 0.3)
factors = st.sampled_from([0.9, 0.5, 0.0])
decays = st.sampled_from([0.05, 1e-3, 0.0])
shapes = st.one_of(
    st.sampled_from([(), (0,), (1023,), (1025,), (2999,)]),
    st.tuples(st.integers(0, 3000)),
    st.tuples(st.integers(0, 5), st.integers(1, 37), st.integers(1, 7)),
)
types = [st.just("float64"), st.just("float32"), st.sampled_from(["bfloat16", "float16", "float32"])]


@st.composite
def sgd_groups(draw):
    momentum, nesterov = draw(factors), draw(st.booleans())
    return {
        "lr": draw(rates),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw(st.sampled_from([0.0, 0.3])),
        "nesterov": nesterov and momentum > 0,
        "weight_decay": draw(decays),
        "decoupled_weight_decay": draw(st.booleans()),
    }


@st.composite
def adam_groups(draw):
    """The smallest eps bounds how much Adam magnifies the rounding of a gradient near zero."""
    return {
        "lr": draw(rates),
        "betas": (draw(factors), draw(st.sampled_from([0.5, 0.99, 0.999]))),
        "eps": draw(st.sampled_from([1e-2, 1.0])),
        "weight_decay": draw(decays),
        "decoupled_weight_decay": draw(st.booleans()),
    }


@dataclass
class Training:
    """One drawn example."""

    kind: str
    extrapolation: str
    layers: list[tuple[tuple[int, ...], str, int]]  # shape, type and group of each parameter
    groups: list[dict]
    inner_lr: float | str
    tile: int
    workers: int  # per rank
    steps: int
    absence: float  # how many of the gradients are None
    seed: int

    @property
    def dtypes(self):
        return [dtype for _, dtype, _ in self.layers]

    def values(self, random, limit=4):
        """An array per layer on a grid of eighths, on which sums over workers are exact in every type."""
        return [
            random.integers(-8 * limit, 8 * limit, math.prod(shape)).astype(WORKING[dtype]) / 8
            for shape, dtype, _ in self.layers
        ]

    def gradients(self, K):
        """For each step, each worker's list of gradients, None where it has none."""
        random = np.random.default_rng(self.seed)
        for _ in range(self.steps):
            present = random.random((K, len(self.layers))) >= self.absence
            yield [
                [g if here else None for g, here in zip(self.values(random), mask, strict=True)]
                for mask in present
            ]

    def initial(self):
        weights = self.values(np.random.default_rng(self.seed + 1))
        return [rounded(w, dtype) for w, dtype in zip(weights, self.dtypes, strict=True)]


@st.composite
def trainings(draw, kind, extrapolation):
    count = draw(st.integers(1, 3))
    group = sgd_groups() if kind == "SGD" else adam_groups()
    layer = st.tuples(shapes, draw(st.sampled_from(types)), st.integers(0, count - 1))
    return Training(
        kind,
        extrapolation,
        layers=sorted(draw(st.lists(layer, min_size=1, max_size=6)), key=lambda layer: layer[2]),
        groups=draw(st.lists(group, min_size=count, max_size=count)),
        inner_lr=draw(st.sampled_from(["lr", "lr/K", 0.125, 0.0])),
        tile=draw(st.integers(1, 5000)),
        workers=draw(st.integers(1, 5)),
        steps=draw(st.sampled_from([3, 2, 4, 1])),
        absence=draw(st.sampled_from([0.0, 0.3, 0.8])),
        seed=draw(st.integers(0, 2**20)),
    )


def of_every_kind(test):
    """A property of all rules and extrapolations, given examples of each."""
    return pytest.mark.parametrize("kind", KINDS, ids="-".join)(
        settings(max_examples=20)(given(st.data())(test))
    )


def on_all_ranks(check, *arguments):
    """Collective: what fails on one rank fails on all, at the same line."""
    try:
        check(*arguments)
        failure = None
    except AssertionError as error:
        failure = str(error)
    failures = [text for text in COMM.allgather(failure) if text is not None]
    assert not failures, failures[0]


def numbered(world):
    """This rank's workers: v and the number among all."""
    return [(v, world.rank * world.workers + v) for v in range(world.workers)]


class Ours:
    """A training with this library's optimizer."""

    def __init__(self, training, world, **options):
        self.training, self.world = training, world
        self.params = [
            torch.nn.Parameter(torch.from_numpy(w).reshape(shape).to(getattr(torch, dtype)))
            for w, (shape, dtype, _) in zip(training.initial(), training.layers, strict=True)
        ]
        groups = [
            {
                "params": [p for p, (*_, own) in zip(self.params, training.layers, strict=True) if own == g],
                **hyper,
            }
            for g, hyper in enumerate(training.groups)
        ]
        options = {"extrapolation": training.extrapolation, "inner_lr": training.inner_lr, **options}
        self.opt = getattr(xc, training.kind)(groups, world=world, **{"tile": training.tile, **options})

    def step(self, grads):
        self.opt.zero_grad()
        for v, k in numbered(self.world):
            with self.opt.worker(v):
                for p, g in zip(self.params, grads[k], strict=True):
                    p.grad = None if g is None else torch.from_numpy(g).reshape(p.shape).to(p.dtype)
        self.opt.step()

    def run(self):
        for grads in self.training.gradients(self.world.K):
            self.step(grads)
        return self

    def master(self):
        return [self.opt.master(i).flatten().numpy() for i in range(len(self.params))]

    def published(self):
        """By the number of the worker, what each of this rank's workers holds."""
        held = {}
        for v, k in numbered(self.world):
            with self.opt.worker(v):
                held[k] = [p.detach().flatten().to(torch.float64).numpy() for p in self.params]
        return held


def twin(training, K, precision=None):
    """The reference after the same training."""
    groups = [training.groups[g] for *_, g in training.layers]
    engine = ReferenceEngine(
        training.initial(),
        K,
        CLASSES[training.kind],
        training.extrapolation,
        training.inner_lr,
        training.dtypes,
        precision,
        groups,
    )
    for grads in training.gradients(K):
        engine.step(grads)
    return engine


def compare(ours, exact, double):
    training = ours.training
    epsilon = np.finfo(WORKING[training.dtypes[0]]).eps
    for w, same, close in zip(ours.master(), exact.w, double.w, strict=True):
        assert_same_bits(w, same, "master weights")
        np.testing.assert_allclose(w, close, rtol=256 * epsilon, atol=256 * epsilon)
    for k, held in ours.published().items():
        for x, same in zip(held, exact.x[k], strict=True):
            assert_same_bits(x, same.astype(np.float64), f"weights of worker {k}")


@of_every_kind
def test_any_training_equals_the_reference(worlds, kind, data):
    training = data.draw(trainings(*kind))
    world = worlds(training.workers)
    ours = Ours(training, world).run()
    on_all_ranks(compare, ours, twin(training, world.K), twin(training, world.K, "float64"))
    ours.opt.close()


def assert_same_masters(one, other):
    for w, same in zip(one.master(), other.master(), strict=True):
        assert_same_bits(w, same, "master weights")


def assert_same_training(one, other):
    assert_same_masters(one, other)
    held, also_held = one.published(), other.published()
    for k in held.keys() & also_held.keys():
        for x, same in zip(held[k], also_held[k], strict=True):
            assert_same_bits(x, same, f"weights of worker {k}")


@of_every_kind
def test_grouping_of_workers_into_ranks_does_not_change_the_bits(worlds, virtual, kind, data):
    """All ranks together, and this rank alone with as many workers and another tile."""
    training, tile = data.draw(trainings(*kind)), data.draw(st.integers(1, 5000))
    world = worlds(training.workers)
    spread = Ours(training, world).run()
    alone = Ours(training, virtual(world.K), tile=tile).run()
    on_all_ranks(assert_same_training, spread, alone)
    spread.opt.close()
    alone.opt.close()


@of_every_kind
def test_training_resumed_from_its_state_goes_on_with_the_same_bits(worlds, kind, data):
    training, stop = data.draw(trainings(*kind)), data.draw(st.integers(0, 4))
    world = worlds(training.workers)
    whole, resumed = Ours(training, world), Ours(training, world)
    for step, grads in enumerate(training.gradients(world.K)):
        if step == stop:
            fresh = Ours(training, world)
            fresh.opt.load_state_dict(resumed.opt.state_dict())
            resumed.opt.close()
            resumed = fresh
        whole.step(grads)
        resumed.step(grads)
    on_all_ranks(assert_same_masters, whole, resumed)
    whole.opt.close()
    resumed.opt.close()


class OursInArrays:
    """A training of one group in an Engine; every gradient is there."""

    def __init__(self, training, world, **options):
        self.training, self.world = training, world
        arrays = [
            stored(w, dtype).reshape(shape)
            for w, (shape, dtype, _) in zip(training.initial(), training.layers, strict=True)
        ]
        kind = {"extrapolation": training.extrapolation, "displacement": "raw"}
        how = {**kind, "inner_lr": training.inner_lr, **training.groups[0]}
        self.engine = xc.Engine(world, arrays, CLASSES[training.kind], **how, **options)

    def run(self, fused):
        self.training.absence = 0.0
        for grads in self.training.gradients(self.world.K):
            for v, k in numbered(self.world):
                for view, g in zip(self.engine.workers[v].grads, grads[k], strict=True):
                    view[...] = stored(g, str(view.dtype).removeprefix("torch.")).reshape(view.shape)
            (self.engine.step if fused else self.engine.step_unfused)()
        return self

    def master(self):
        return [np.asarray(w).flatten() for w in self.engine.master()]

    def published(self):
        return {
            k: [loaded(x).flatten() for x in self.engine.workers[v].weights] for v, k in numbered(self.world)
        }


@of_every_kind
def test_tiles_streams_and_fusion_do_not_change_the_bits(worlds, kind, data):
    """Without fusion 16-bit weights are rounded once more."""
    training, tile = data.draw(trainings(*kind)), data.draw(st.integers(1, 5000))
    world = worlds(training.workers)
    plain = OursInArrays(training, world, tile=training.tile, streaming=False).run(fused=True)
    fused = bool({"float16", "bfloat16"} & set(training.dtypes))
    other = OursInArrays(training, world, tile=tile, streaming=True).run(fused=fused)
    on_all_ranks(assert_same_training, plain, other)
    plain.engine.close()
    other.engine.close()
