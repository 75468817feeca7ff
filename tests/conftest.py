"""Worlds for the tests, and one verdict per test for all ranks.

The suite is the same at any number of ranks, but for worlds of one process, which the run without an mpirun has for
all: `pytest` and `mpirun -n N pytest`. Every rank runs every test;
after each phase of a test (set-up, call, tear-down) the ranks compare their outcomes, so that a test fails on
all of them or on none and nobody walks alone into the next test's collectives.
"""

import io
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, Phase, settings
from mpi4py import MPI
from reference import assert_same_bits

import extrapcomm as xc

COMM = MPI.COMM_WORLD
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many ranks, few cores
LIMITS = {"step_timeout": 60.0, "pass_timeout": 30.0, "warn_after": 20.0}

# Ranks that share memory, where a run wants the suite's worlds cut into several teams (tests/run.py --ranks 2/1).
TEAM = int(os.environ.get("XC_TEST_TEAM", "0"))


def in_teams(make):
    """World.__init__ that cuts every world of more ranks into teams of so many, unless a test says otherwise."""

    def __init__(self, comm=None, workers=1, **options):
        if TEAM and isinstance(workers, int) and workers > 0:
            options.setdefault("workers_per_team", TEAM * workers)
        make(self, comm, workers, **options)

    return __init__


# What works inside one team alone, in the words of its refusal; a test that runs into it has nothing to show then.
INSIDE_ONE_TEAM = {
    "an unfused step works inside one team": "unfused steps work inside one team",
    "compares all workers' gradients element by element": "rules that compare all gradients work inside one team",
}

# Likewise where all engines run on a device, which XC_DEVICE=host makes of the host.
DEVICE = os.environ.get("XC_DEVICE", "")
NOT_ON_DEVICES = {
    " no kernels on host": "what has no kernels on devices",
    "local steps are taken on the CPU only": "local steps are taken on the CPU only",
    "unfused steps are taken on the CPU only": "unfused steps are taken on the CPU only",
}

if TEAM:
    xc.World.__init__ = in_teams(xc.World.__init__)


def skip_if_refused(failure):
    """Tests whose subject is refused in teams, or on a device, have nothing to show there."""
    if not isinstance(failure, xc.UsageError):
        return
    for words, reason in INSIDE_ONE_TEAM.items():
        if TEAM and words in str(failure):
            pytest.skip(reason)
    for words, reason in NOT_ON_DEVICES.items():
        if DEVICE and words in str(failure):
            pytest.skip(reason)


# The same examples on every rank and in every run. Whoever makes a failing example smaller looks at the clock, and
# ranks that see different times would try different ones; the check for slow examples looks at it, too.
settings.register_profile(
    "ranks",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40 if COMM.size < 3 else 15,  # where ranks are more than cores
    phases=list(Phase) if COMM.size == 1 else [Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ranks")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Rank 0 reports; the others speak on stderr, and only of their failures."""
    if COMM.rank:
        config.pluginmanager.getplugin("terminalreporter")._tw._file = io.StringIO()


def pytest_collection_modifyitems(items):
    """Tests that start an mpirun of their own cannot do so under another one."""
    alone = pytest.mark.skipif(COMM.size > 1, reason="starts its own mpirun; runs in the plain suite")
    for item in items:
        if item.get_closest_marker("own_mpirun"):
            item.add_marker(alone)


def pytest_collection_finish(session):
    """Ranks that collected different tests could only deadlock."""
    if len(set(COMM.allgather(tuple(item.nodeid for item in session.items)))) > 1:
        pytest.exit(f"rank {COMM.rank}: the ranks collected different tests", returncode=3)


def share_verdict(item, phase, failure):
    """Collective. Raises on the ranks that did well what another rank failed with."""
    if failure is not None and COMM.size > 1 and not item.get_closest_marker("xfail"):
        sys.stderr.write(f"\nrank {COMM.rank}: {item.nodeid} ({phase})\n{traced(failure)}")
        sys.stderr.flush()
    if not anywhere(failure is not None):
        return
    told = COMM.allgather(None if failure is None else f"{type(failure).__name__}: {failure}")
    others = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
    if failure is None and others:
        pytest.fail(f"{phase} failed elsewhere\n" + "\n".join(others), pytrace=False)


def anywhere(here):
    """Collective: whether it is true on any rank. Sleeps while it waits: cores may be fewer than ranks."""
    mine, any_of_all = np.array([here]), np.empty(1, dtype=bool)
    request = COMM.Iallreduce(mine, any_of_all, MPI.LOR)
    while not request.Test():
        time.sleep(1e-4)
    return any_of_all[0]


def traced(failure):
    """The traceback without the frames of pytest itself."""
    frames = traceback.extract_tb(failure.__traceback__)
    ours = [frame for frame in frames if not {"_pytest", "pluggy"} & set(Path(frame.filename).parts)]
    return "".join(traceback.format_list(ours) + traceback.format_exception_only(failure))


def refusals_as_skips():
    try:
        return (yield)
    except xc.UsageError as refusal:
        skip_if_refused(refusal)
        raise


def phase_of(name):
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def hook(item):
        try:
            result = yield from refusals_as_skips()
        except pytest.skip.Exception:
            share_verdict(item, name, None)
            raise
        except (Exception, pytest.fail.Exception) as failure:
            share_verdict(item, name, failure)
            raise
        share_verdict(item, name, None)
        return result

    return hook


pytest_runtest_setup = phase_of("set-up")
pytest_runtest_call = phase_of("call")
pytest_runtest_teardown = phase_of("tear-down")


class Worlds:
    """Worlds by communicator and number of workers, made once and kept for the session."""

    def __init__(self, comm):
        self.comm, self.made = comm, {}

    def __call__(self, workers):
        if workers not in self.made:
            self.made[workers] = xc.World(self.comm, workers=workers, **LIMITS)
        return self.made[workers]

    def close(self):
        for world in self.made.values():
            world.close()


def kept(comm):
    worlds = Worlds(comm)
    yield worlds
    worlds.close()


@pytest.fixture(scope="session")
def worlds():
    """worlds(V): the world of all ranks with V workers each."""
    yield from kept(COMM)


@pytest.fixture(scope="session")
def virtual():
    """virtual(K): a world of this rank alone with K workers."""
    yield from kept(MPI.COMM_SELF)


@pytest.fixture(scope="session")
def world(worlds):
    """All ranks, one worker each."""
    return worlds(1)


# Worlds of one process are the same in every run, so the one without an mpirun has them for all; and many ranks with
# several workers each are slow where cores are few, so two ranks have those.
# Without an mpirun nothing of MPI is used, so one of them has all of these worlds.
ALONE = (
    ["1", "2", "3", "4", "7", "ranks", "ranks x 2"] if MPI.get_vendor()[0] == "Open MPI" else ["3", "ranks"]
)
TEAMS = {1: ALONE, 2: ["ranks", "ranks x 2"]}.get(COMM.size, ["ranks"])


@pytest.fixture(params=TEAMS, ids=lambda name: f"K={name}")
def team(request, virtual, worlds):
    """Every kind of world: all ranks with one worker; two also with two each; one also 1, 2, 3, 4, 7 workers alone."""
    if request.param.isdigit():
        return virtual(int(request.param))
    return worlds(2 if request.param.endswith("2") else 1)


class Pair:
    """An engine beside its reference, fed with the same random gradients.

    dtype is one for all layers, or a list of one for each.
    """

    def __init__(self, world, lengths, dtype, *, tile=4096, seed=0, streaming=None, **options):
        self.world = world
        self.layers = list(
            zip(lengths, [dtype] * len(lengths) if isinstance(dtype, str) else dtype, strict=True)
        )
        self.random = np.random.default_rng(seed)
        weights = self.values()
        arrays = [stored(w, dtype) for w, (_, dtype) in zip(weights, self.layers, strict=True)]
        self.engine = xc.Engine(world, arrays, tile=tile, streaming=streaming, **options)
        self.exact = reference.ReferenceEngine(weights, world.K, dtype=dtype, **options)
        self.double = reference.ReferenceEngine(weights, world.K, dtype=dtype, precision="float64", **options)

    def values(self):
        return [
            reference.rounded(self.random.normal(size=n).astype(reference.WORKING[dtype]), dtype)
            for n, dtype in self.layers
        ]

    def step(self, fused=True, **hyper):
        grads = [self.values() for _ in range(self.world.K)]
        for worker, mine in self.local(grads):
            for view, g, (_, dtype) in zip(worker.grads, mine, self.layers, strict=True):
                view[...] = stored(g, dtype)
        (self.engine.step if fused else self.engine.step_unfused)(**hyper)
        self.exact.step(grads, **hyper)
        self.double.step(grads, **hyper)

    def local(self, of_all):
        """This rank's workers, each with its entry of a list over all workers."""
        first = self.world.rank * self.world.workers
        return zip(self.engine.workers, of_all[first : first + self.world.workers], strict=True)

    def compare(self, tolerance):
        """Equal to the reference in the engine's own type bit for bit, close to the reference in float64."""
        for w, exact, double in zip(self.engine.master(), self.exact.w, self.double.w, strict=True):
            assert_same_bits(w, exact, "master weights")
            np.testing.assert_allclose(w, double, rtol=tolerance, atol=tolerance)
        for worker, x in self.local(self.exact.x):
            for view, exact in zip(worker.weights, x, strict=True):
                assert_same_bits(loaded(view), exact, "published weights")


@pytest.fixture
def pair():
    """pair(world, lengths, dtype, **options) -> Pair; its engine is closed after the test."""
    made = []

    def make(*args, **options):
        made.append(Pair(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


def stored(values, dtype):
    """As the array type that the engine is given for this dtype: NumPy, but torch for bfloat16."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    torch = pytest.importorskip("torch")
    return torch.from_numpy(values.copy()).to(torch.bfloat16)


def loaded(view):
    """A view's values as a NumPy array of the working type."""
    if not isinstance(view, np.ndarray):
        return view.float().numpy()
    return view.astype(reference.WORKING[str(view.dtype)])
