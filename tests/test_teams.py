"""Ranks of one machine cut into teams that share no memory: the same bits, the same errors, as one team."""

import sys

import numpy as np
import pytest
from conftest import COMM, LIMITS
from conftest import Pair as EnginePair
from reference import assert_same_bits
from test_clipping import Twins
from test_collectives import filled, local, reduced
from test_faults import SURVIVORS, run_ranks
from test_order import ADAM, LENGTHS, NESTEROV, SHARED_OPTIONS, run
from test_post_local import Pair as LocalPair
from test_presence import PATTERNS
from test_presence import run as run_with_absent

import extrapcomm as xc

torch = pytest.importorskip("torch")

COMPARING = [
    name for name in SHARED_OPTIONS if name.startswith("vr")
]  # element by element, so within one team
SENDING = {name: options for name, options in SHARED_OPTIONS.items() if name not in COMPARING}

# Ranks of a team, workers of a rank.
CUTS = {"teams of 1": (1, 1), "teams of 2": (2, 1), "teams of 3": (3, 1), "teams of 1 x 2": (1, 2)}


@pytest.fixture(scope="module")
def cuts():
    """cuts(ranks of a team, workers of a rank): a world of all ranks, which have to be more than a team."""
    made = {}

    def world_of(ranks, workers):
        if COMM.size <= ranks:
            pytest.skip(f"several teams of {ranks} need more than {ranks} rank{'s' * (ranks > 1)}")
        if (ranks, workers) not in made:
            made[ranks, workers] = xc.World(COMM, workers, workers_per_team=ranks * workers, **LIMITS)
        return made[ranks, workers]

    yield world_of
    for world in made.values():
        world.close()


@pytest.fixture(params=["teams of 1", "teams of 2", "teams of 1 x 2"])
def cut(request, cuts):
    """Teams in which sums are the same tree as in one: 2, or 2 and 1, or 2 and 2, or one rank for each."""
    world = cuts(*CUTS[request.param])
    assert world.keeps_order
    return world


@pytest.fixture
def singles(cuts):
    """Every rank a team."""
    return cuts(1, 1)


@pytest.fixture
def crossed(monkeypatch):
    """Two teams whose ranks take turns, as if the launcher had dealt them to two hosts."""
    if COMM.size < 3:
        pytest.skip("teams whose ranks take turns need three ranks")
    monkeypatch.setattr(sys.modules["extrapcomm.world"], "_boot_id", lambda: f"host-{COMM.rank % 2}")
    with xc.World(COMM, workers_per_team=COMM.size, **LIMITS) as world:
        assert not world.keeps_order
        yield world


@pytest.fixture(params=["3 and 1", "in turns"])
def reordered(request):
    """Teams whose sums are another tree than that of one team."""
    if request.param == "in turns":
        return request.getfixturevalue("crossed")
    world = request.getfixturevalue("cuts")(3, 1)
    assert not world.keeps_order
    return world


def is_last(world):
    return world.rank == world.size - 1


# ---- the same numbers ----


@pytest.mark.parametrize("options", SENDING.values(), ids=SENDING)
def test_rules_and_displacements_give_the_bits_of_one_team(cut, virtual, options):
    assert run(cut, **options) == run(virtual(cut.K), **options)


@pytest.mark.parametrize("options", [NESTEROV, ADAM], ids=["sgd", "adam"])
def test_three_teams_of_four_workers_give_the_bits_of_twelve_alone(cuts, virtual, options):
    if COMM.size != 3:
        pytest.skip("needs three ranks")
    world = cuts(1, 4)
    assert world.keeps_order
    assert run(world, **options) == run(virtual(12), **options)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("extrapolation", ["none", "local", "global", "anisotropic"])
def test_types_give_the_bits_of_one_team(cut, virtual, dtype, extrapolation):
    options = {**NESTEROV, "dtype": dtype, "extrapolation": extrapolation}
    assert run(cut, **options) == run(virtual(cut.K), **options)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("options", [NESTEROV, ADAM], ids=["sgd", "adam"])
def test_gain_gives_the_bits_of_one_team(cut, virtual, options, lag):
    def bits(world):
        return run(world, gain=xc.AdaScale(lag=lag), **options)

    assert bits(cut) == bits(virtual(cut.K))


@pytest.mark.parametrize("extrapolation", ["none", "local", "global"])
def test_clipped_and_skipped_steps_follow_the_reference(cut, extrapolation):
    twins = Twins(cut, extrapolation, max_grad_norm=0.5, skip_nonfinite=True)
    twins.step()
    before = twins.state()
    twins.step(poison=np.inf)
    assert twins.engine.skipped
    for was, now in zip(before, twins.state(), strict=True):
        assert_same_bits(now, was)
    twins.step(scale=10.0)
    for w, exact in zip(twins.engine.master(), twins.twin.w, strict=True):
        assert_same_bits(w, exact)
    for x, exact in zip(twins.engine.workers[0].weights, twins.twin.x[cut.rank * cut.workers], strict=True):
        np.testing.assert_allclose(
            x, exact, rtol=1e-5, atol=1e-7
        )  # the twin rounds the clipped rate otherwise
    twins.engine.close()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("extrapolation", ["none", "local", "global"])
def test_absent_gradients_follow_the_reference(cut, pattern, extrapolation):
    run_with_absent(cut, "SGD", pattern, extrapolation)


@pytest.mark.parametrize("rule", ["sgd", "adam", "lamb"])
def test_teams_of_another_order_are_close_to_the_reference_and_alike(reordered, rule):
    pair = EnginePair(reordered, LENGTHS, "float32", rule=rule, extrapolation="local", lr=0.01)
    for _ in range(4):
        pair.step()
    master = pair.engine.master()
    for w, double in zip(master, pair.double.w, strict=True):
        np.testing.assert_allclose(w, double, rtol=2e-4, atol=2e-4)
    for worker, of_all in pair.local(pair.double.x):
        for x, double in zip(worker.weights, of_all, strict=True):
            np.testing.assert_allclose(x, double, rtol=2e-4, atol=2e-4)
    assert len(set(COMM.allgather(b"".join(w.tobytes() for w in master)))) == 1
    pair.engine.close()


@pytest.mark.parametrize("rule", COMPARING)
def test_rules_that_compare_all_gradients_are_refused(singles, rule):
    with pytest.raises(xc.UsageError, match="one team"), xc.Engine(singles, np.ones(5000), rule) as engine:
        engine.step()


# ---- what belongs to training ----


def trained(world, steps, opt=None, params=None, extrapolation="local"):
    """An optimizer of Adam's after some steps, and its parameters."""
    random = np.random.RandomState(steps)
    if opt is None:
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3000, 7)]
        opt = (
            xc.ExtrapAdam(params, lr=0.01, world=world)
            if extrapolation != "none"
            else xc.Adam(params, world=world)
        )
    first = world.rank * world.workers
    for _ in range(steps):
        grads = [[random.uniform(-1, 1, p.shape).astype("float32") for p in params] for _ in range(world.K)]
        for v in range(world.workers):
            with opt.worker(v):
                for p, g in zip(params, grads[first + v], strict=True):
                    p.grad = torch.from_numpy(g)
        opt.step()
    return opt, params


def bits_of(state):
    """What a state_dict holds, in a form that compares."""
    return {
        (i, name): value.numpy().tobytes() if torch.is_tensor(value) else value
        for i, entry in state["state"].items()
        for name, value in entry.items()
    }


def test_state_of_all_teams_is_that_of_one_on_every_rank(cut, virtual):
    ours, _ = trained(cut, 3)
    alone, _ = trained(virtual(cut.K), 3)
    assert bits_of(ours.state_dict()) == bits_of(alone.state_dict())
    ours.close()
    alone.close()


def test_state_for_rank_0_alone_is_whole_there_and_nowhere_else(cut, virtual):
    ours, _ = trained(cut, 2)
    alone, _ = trained(virtual(cut.K), 2)
    state = ours.state_dict(rank0_only=True)
    if cut.rank == 0:
        assert bits_of(state) == bits_of(alone.state_dict())
    else:
        assert not state.get("state")
    ours.close()
    alone.close()


@pytest.mark.parametrize("local", [False, True], ids=["whole", "parts"])
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(cut, virtual, local):
    first, _ = trained(cut, 2, extrapolation="none")
    saved = first.local_state_dict() if local else first.state_dict()
    first.close()
    second, params = trained(cut, 0, extrapolation="none")
    (second.load_local_state_dict if local else second.load_state_dict)(saved)
    trained(cut, 3, second, params)
    alone, theirs = trained(virtual(cut.K), 2, extrapolation="none")
    trained(virtual(cut.K), 3, alone, theirs)
    assert bits_of(second.state_dict()) == bits_of(alone.state_dict())
    second.close()
    alone.close()


def test_adopted_weights_are_those_of_the_first_rank_in_all_teams(cut):
    param = torch.nn.Parameter(torch.zeros(2500))
    opt = xc.SGD([param], lr=0.1, world=cut)
    opt.step()
    with torch.no_grad():
        param.fill_(cut.rank + 5)
    opt.adopt()
    assert (opt.master(0) == 5).all()
    for v in range(cut.workers):
        with opt.worker(v):
            assert (param == 5).all()
    opt.close()


@pytest.mark.parametrize(
    "hyper", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}]
)
def test_local_steps_and_their_averages_follow_the_reference(cut, hyper):
    pair = LocalPair(cut, local_steps=2, start=1, **hyper)
    for _ in range(6):
        pair.step(absent={(0, 1)})
        pair.compare()
    pair.opt.close()


def test_all_ranks_have_the_same_master_weights(cut):
    opt, params = trained(cut, 2)
    with opt.master_weights():
        here = b"".join(p.detach().numpy().tobytes() for p in params)
    assert len(set(COMM.allgather(here))) == 1
    opt.close()


# ---- collectives ----


@pytest.mark.parametrize("length", [0, 1, 1025, 5040])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_collectives_follow_the_reference(cut, dtype, length):
    array, values = filled(cut, length, dtype)
    last = cut.K - 1
    xc.broadcast(array, root=last)
    for view in array.views:
        assert_same_bits(view, values[last])
    for op in ("sum", "mean"):
        for view, mine in local(array, cut, values):
            view[...] = mine
        xc.reduce_scatter(array, op=op)
        wanted = reduced(values, dtype, op)
        for view, k in local(array, cut, range(cut.K)):
            assert_same_bits(view[array.block(k)], wanted[array.block(k)])
        xc.all_gather(array)
        for view in array.views:
            assert_same_bits(view, wanted)
        for view, mine in local(array, cut, values):
            view[...] = mine
        xc.all_reduce(array, op=op)
        for view in array.views:
            assert_same_bits(view, wanted)
    array.close()


def test_collectives_of_teams_of_another_order_are_exact_for_whole_numbers(reordered):
    array = xc.arena_array(3000, world=reordered)
    array.view[...] = np.arange(3000) + reordered.rank
    xc.all_reduce(array)
    K = reordered.K
    assert_same_bits(array.view, (K * np.arange(3000) + K * (K - 1) // 2).astype("float32"))
    array.close()


# ---- mistakes ----


def test_mistakes_of_one_rank_are_the_same_error_in_all_teams_and_spoil_nothing(cut):
    odd, last = is_last(cut), cut.size - 1
    engine = xc.Engine(cut, np.ones(3000), lr=0.5)
    with pytest.raises(
        xc.MismatchError, match=f"lr of parameter group 0 is 0.5 on rank 0 but 0.25 on rank {last}"
    ):
        engine.step(lr=0.25 if odd else 0.5)
    with pytest.raises(xc.UsageError, match=f"rank {last}: lr must be finite"):
        engine.step(lr=float("nan") if odd else 0.5)
    for worker in engine.workers:
        worker.grads[:] = 1
    engine.step()
    assert engine.master().tolist() == [0.5] * 3000
    engine.close()


def test_other_shapes_and_options_of_one_rank_are_a_mismatch(cut):
    odd = is_last(cut)
    with pytest.raises(xc.MismatchError, match=r"\(5\).*\(6\)"):
        xc.Engine(cut, np.ones(5 + odd))
    with pytest.raises(xc.MismatchError, match="rule sgd.*rule adam"):
        xc.Engine(cut, np.ones(5), rule="adam" if odd else "sgd")


def test_calls_in_another_order_are_a_mismatch_that_names_the_rank(cut):
    odd, last = is_last(cut), cut.size - 1
    param = torch.nn.Parameter(torch.zeros(2500))
    opt = xc.SGD([param], lr=1.0, world=cut)
    opt.step()
    with pytest.raises(xc.MismatchError, match=f"rank {last}"):
        opt.adopt() if odd else opt.step()
    for v in range(cut.workers):
        with opt.worker(v):
            param.grad = torch.ones(2500)
    opt.step()
    assert (opt.master(0) == -1).all()
    opt.close()


def test_rank_that_closes_its_engine_is_named_in_all_teams(cut):
    last = cut.size - 1
    engine = xc.Engine(cut, np.ones(3000))
    engine.step()
    if is_last(cut):
        engine.close()
    else:
        with pytest.raises(xc.PeerError, match=f"rank {last} left") as caught:
            engine.step()
        assert caught.value.rank == last
    engine.close()
    assert run(cut) == run(cut)  # the world goes on


@pytest.mark.parametrize("wrong", [0, -2, "2", 1.5, True, 3])
def test_wrong_team_sizes_are_refused_by_all(wrong):
    with pytest.raises(xc.UsageError, match="workers_per_team must be a multiple of the 2 workers"):
        xc.World(COMM, workers=2, workers_per_team=wrong if COMM.rank == COMM.size - 1 else 2, **LIMITS)


def test_other_team_sizes_of_one_rank_are_a_mismatch():
    if COMM.size < 2:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(xc.MismatchError, match="1 per team.*2 per team"):
        xc.World(COMM, workers_per_team=2 if COMM.rank == COMM.size - 1 else 1, **LIMITS)


# ---- ranks that are lost ----


LOSING = """
    world = xc.World(workers_per_team={team}, step_timeout={timeout}, pass_timeout={timeout})
    engine = engine_of(world)
    engine.step()
    pids = world.comm.allgather(os.getpid())
    if world.rank == 1:
        os.kill(os.getpid(), signal.{signal})
    since = time.monotonic()
    try:
        engine.step()
    except xc.PeerError as error:
        report(error)
        say("soon" if time.monotonic() - since < {soon} else "late")
    {afterwards}
    os._exit(0)
"""


@pytest.mark.own_mpirun
@pytest.mark.parametrize("team", [1, 2])
def test_killed_rank_is_named_in_all_teams(team):
    """By those of its own team at once, and by them to others; where it had none, by the deadline."""
    timeout = 30 if team == 2 else 2
    script = LOSING.format(team=team, timeout=timeout, signal="SIGKILL", soon=8, afterwards="time.sleep(1)")
    _, output, _ = run_ranks(3, script, *SURVIVORS)
    assert output.count("PeerError rank=1 rank 1") == 2, output
    assert output.count("soon") == 2, output


@pytest.mark.own_mpirun
def test_rank_killed_in_another_team_is_named_by_one_that_waits_for_its_own_team():
    """Whoever waits for rank 0 listens to all ranks, and MPI knows already that one of them is gone."""
    _, output, _ = run_ranks(
        3,
        """
        world = xc.World(workers_per_team=2, step_timeout=5, pass_timeout=5)
        engine = engine_of(world)
        engine.step()
        world.comm.Barrier()
        if world.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if world.rank == 0:
            time.sleep(1)
        try:
            engine.step()
        except xc.PeerError as error:
            report(error)
        time.sleep(1)
        os._exit(0)
        """,
        *SURVIVORS,
    )
    assert output.count("PeerError rank=2 rank 2") == 2, output


@pytest.mark.own_mpirun
@pytest.mark.parametrize("team", [1, 2])
def test_stopped_rank_is_found_by_the_deadline_in_all_teams(team):
    wake = "os.kill(pids[1], signal.SIGCONT) if world.rank == 2 and not time.sleep(1) else None"
    script = LOSING.format(team=team, timeout=1, signal="SIGSTOP", soon=4, afterwards=wake)
    _, output, _ = run_ranks(3, script, *SURVIVORS)
    assert output.count("PeerError rank=1 rank 1 did not come in time") >= 2, output


@pytest.mark.parametrize("way", ["direct", "halving"])
def test_reduce_scatter_leaves_the_rest_of_the_arrays(way):
    if COMM.size == 1:
        pytest.skip("several teams need two ranks")
    with xc.World(COMM, workers_per_team=1, wire=xc.WireOptions(way=way), **LIMITS) as world:
        array = xc.arena_array(1000, world=world)
        array.view[:] = wanted = np.full(1000, world.rank + 1.0, np.float32)
        xc.reduce_scatter(array)
        wanted[array.block(world.rank)] = sum(range(1, world.size + 1))
        assert_same_bits(array.view, wanted)
        array.close()


def test_gradient_that_is_no_number_gives_clars_the_same_ratios_everywhere(singles, virtual):
    def weights(world):
        engine = xc.Engine(world, np.ones((40, 30), np.float32), "clars", lr=0.1)
        for v, worker in enumerate(engine.workers):
            worker.grads[...] = world.rank * world.workers + v + 1
            worker.grads[7, 7] = np.nan if world.rank * world.workers + v == world.K - 1 else 1
        engine.step()
        found = engine.master()
        engine.close()
        return found

    assert_same_bits(weights(singles), weights(virtual(singles.K)))


def test_rank_that_left_is_named_by_those_who_construct(monkeypatch):
    if COMM.size == 1:
        pytest.skip("several teams need two ranks")
    monkeypatch.setattr(sys.modules["extrapcomm.world"], "_ON_ITS_WAY", 0.1)
    world = xc.World(COMM, workers_per_team=1, **LIMITS)
    if world.rank == world.size - 1:
        world.close()
    else:
        with pytest.raises(xc.PeerError, match=f"rank {world.size - 1} left, before a collective") as caught:
            xc.Engine(world, np.ones(5), lr=0.1)
        assert (caught.value.rank, caught.value.kind) == (world.size - 1, "left")
    COMM.Barrier()
    world.close()
