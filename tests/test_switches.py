"""Torch's switches: maximize, amsgrad, foreach, fused, capturable, differentiable; and arguments that do not exist."""

import time
from itertools import product

import numpy as np
import pytest
from reference import RULES, assert_same_bits

import extrapcomm as xc

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

# One of every class, with what it needs beside a learning rate, and in the manners of its rule that differ most.
KINDS = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "ExtrapSGD": {"momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"amsgrad": True},
    "ExtrapAdam": {"amsgrad": True, "weight_decay": 0.1},
    "LARS": {"weight_decay": 0.1, "trust_coefficient": 0.1},
    "CLARS": {"weight_decay": 0.1, "trust_coefficient": 0.1, "extrapolation": "anisotropic"},
    "LAMB": {"extrapolation": "local"},
    "LANS": {"extrapolation": "global"},
    "AdamP": {"weight_decay": 0.1, "extrapolation": "local"},
    "SGDP": {"momentum": 0.9, "weight_decay": 0.1},
    "VRSGD": {"momentum": 0.9, "extrapolation": "local"},
    "VRAdam": {"layer_mean": "last"},
    "VRLARS": {"weight_decay": 0.1, "trust_coefficient": 0.1},
    "VRLAMB": {"extrapolation": "anisotropic"},
    "EG": {"lr_gain": 0.1, "lr_scale": 0.1, "weight_decay": 0.1, "extrapolation": "local"},
    "PostLocalSGD": {"momentum": 0.9, "local_steps": 2, "start": 1, "extrapolation": "local"},
}
STEPS = 4
SHAPES = [(700,), (4, 30), (1,)]


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def give_gradients(params, opt, step, sign=1.0):
    """Random gradients to every worker of this rank."""
    for v in range(opt.world.workers):
        random = np.random.default_rng([step, opt.world.rank * opt.world.workers + v])
        with opt.worker(v):
            for p in params:
                p.grad = torch.from_numpy(sign * random.normal(size=p.shape)).to(p.dtype)


def weights_of(params, opt):
    """The weights of every worker of this rank, then the master weights."""
    held = []
    for v in range(opt.world.workers):
        with opt.worker(v):
            held += [p.detach().clone().numpy() for p in params]
    return held + [opt.master(i).numpy() for i in range(len(params))]


def trained(kind, world, sign=1.0, **options):
    """The weights after some steps on gradients of this sign, and those gradients' norms."""
    params = parameters()
    opt = getattr(xc, kind)(params, **{"lr": 0.01, **options}, world=world)
    norms = []
    for step in range(STEPS):
        opt.zero_grad()
        give_gradients(params, opt, step, sign)
        opt.step()
        norms.append(opt.grad_norm)
    weights = weights_of(params, opt)
    opt.close()
    return weights, norms


def assert_same(got, wanted):
    for mine, its in zip(got[0], wanted[0], strict=True):
        assert_same_bits(mine, its)
    assert got[1] == wanted[1]


# ---- maximize ----


def test_every_optimizer_is_tried():
    classes = [getattr(xc, name) for name in xc.__all__]
    optimizers = [c for c in classes if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    assert set(KINDS) == {c.__name__ for c in optimizers}


@pytest.mark.parametrize("kind", KINDS)
def test_maximizing_is_minimizing_the_negative_bit_for_bit(team, kind):
    assert_same(
        trained(kind, team, maximize=True, **KINDS[kind]), trained(kind, team, sign=-1.0, **KINDS[kind])
    )


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 0.5, "extrapolation": "anisotropic", "inner_clip": False},
        {"skip_nonfinite": True, "extrapolation": "global"},
        {"inner_lr": "noise", "extrapolation": "local"},
        {"extrapolation": "gaussian"},
        {"gain": True, "extrapolation": "local"},
        {"gain": False},
        {"gradients": "hook"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_what_goes_by_norms_does_not_see_the_sign(team, kind, options):
    if team.K == 1 and (options.get("inner_lr") == "noise" or "gain" in options):
        pytest.skip("needs two workers")

    def made(**sign):
        lag = {"gain": xc.AdaScale(lag=int(options["gain"]))} if "gain" in options else {}
        return trained(kind, team, **{**options, **lag, **sign})

    assert_same(made(maximize=True), made(sign=-1.0))


def test_maximizing_worker_is_displaced_up_its_own_gradient(team):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = xc.ExtrapSGD([p], lr=0.5, inner_lr=0.25, maximize=True, world=team)
    first = team.rank * team.workers
    for v in range(team.workers):
        with opt.worker(v):
            p.grad = torch.full((3,), float(first + v + 1), dtype=torch.float64)
    opt.step()
    w = 0.5 * (team.K + 1) / 2
    np.testing.assert_allclose(opt.master(0), w, rtol=1e-12)
    for v in range(team.workers):
        with opt.worker(v):
            np.testing.assert_allclose(p.detach(), w + 0.25 * (first + v + 1), rtol=1e-12)
    opt.close()


@pytest.mark.parametrize("extrapolation", ["none", "local", "global", "anisotropic"])
@pytest.mark.parametrize("rule", RULES)
def test_maximizing_step_equals_the_reference(pair, team, rule, extrapolation):
    case = next(iter(RULES[rule].cases.values()))
    p = pair(
        team, [5, 700, 1, 2000], "float32", rule=rule, extrapolation=extrapolation, maximize=True, **case
    )
    for lr in (0.1, 0.05):
        p.step(lr=lr)
    p.compare(1e-4)


@pytest.mark.parametrize("extrapolation", ["none", "local", "global", "anisotropic"])
def test_maximizing_unfused_step_equals_the_reference(pair, team, extrapolation):
    p = pair(team, [700], "float64", extrapolation=extrapolation, maximize=True, momentum=0.9)
    for fused in (False, True, False):
        p.step(lr=0.1, fused=fused)
        p.compare(1e-11)


TORCHS = {
    "SGD": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.5},
    "Adam": {"weight_decay": 0.5},
    "AdamW": {"weight_decay": 0.5},
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", TORCHS)
def test_groups_that_maximize_and_groups_that_do_not_are_torchs(team, kind, amsgrad):
    own = {"amsgrad": True} if amsgrad and kind != "SGD" else {}
    ours, theirs = parameters(torch.float64), parameters(torch.float64)

    def groups(params):
        return [{"params": params[:1], "maximize": True}, {"params": params[1:]}]

    opt = getattr(xc, kind)(groups(ours), lr=0.125, **TORCHS[kind], **own, world=team)
    wanted = getattr(torch.optim, kind)(groups(theirs), lr=0.125, **TORCHS[kind], **own)
    for step in range(STEPS):
        give_gradients(ours, opt, step)
        give_mean(theirs, team.K, step)
        opt.step()
        wanted.step()
    for i, p in enumerate(theirs):
        np.testing.assert_allclose(opt.master(i), p.detach(), rtol=1e-11, atol=1e-12)
    opt.close()


def give_mean(params, K, step):
    """The mean of the gradients that all workers have in this step."""
    randoms = [np.random.default_rng([step, k]) for k in range(K)]
    for p in params:
        of_all = [torch.from_numpy(random.normal(size=p.shape)).to(p.dtype) for random in randoms]
        p.grad = sum(of_all) / K


def test_maximizing_gives_torchs_bits_where_nothing_is_rounded(team):
    ours, theirs = (torch.nn.Parameter(torch.full((5,), 3.0)) for _ in range(2))
    options = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "maximize": True}
    opt, wanted = xc.SGD([ours], **options, world=team), torch.optim.SGD([theirs], **options)
    for step in range(STEPS):
        for v in range(team.workers):
            with opt.worker(v):
                ours.grad = torch.arange(-2.0, 3.0) * (step + 1)
        theirs.grad = torch.arange(-2.0, 3.0) * (step + 1)
        opt.step()
        wanted.step()
    assert_same_bits(opt.master(0).numpy(), theirs.detach().numpy())
    opt.close()


def test_ranks_that_differ_in_maximize_are_told(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(xc.MismatchError, match="maximized"):
        xc.SGD(parameters(), lr=0.1, maximize=world.rank == world.size - 1, world=world)


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_switch_cannot_change_after_construction(world, name):
    params = parameters()
    opt = xc.Adam(params, lr=0.1, **{name: True}, world=world)
    if world.rank == world.size - 1:
        opt.param_groups[0][name] = False
    with pytest.raises(xc.UsageError, match=f"{name} cannot change once the engine is built: it is False"):
        opt.step()
    opt.param_groups[0][name] = True
    opt.step()
    opt.close()


def test_engine_of_arrays_takes_maximize_at_construction_only(team):
    engine = xc.Engine(team, np.zeros(3), lr=0.5, maximize=True)
    for worker in engine.workers:
        worker.grads[:] = 2.0
    engine.step()
    assert engine.weights.tolist() == [1.0] * 3
    with pytest.raises(xc.UsageError, match="maximize cannot change"):
        engine.step(maximize=False)
    engine.close()


def test_group_that_is_added_may_maximize(team):
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = xc.SGD([first], lr=0.5, world=team)
    opt.add_param_group({"params": [second], "maximize": True})
    for v in range(team.workers):
        with opt.worker(v):
            first.grad, second.grad = torch.ones(3), torch.ones(3)
    opt.step()
    assert opt.master(0).tolist() == [-0.5] * 3
    assert opt.master(1).tolist() == [0.5] * 3
    opt.close()


# ---- checkpoints ----


@pytest.mark.parametrize("kind", TORCHS)
def test_switches_go_to_torch_and_come_back(team, kind):
    switches = {"maximize": True} | ({"amsgrad": True} if kind != "SGD" else {})
    options = {"lr": 0.125, **TORCHS[kind], **switches}
    ours, theirs, again = (parameters(torch.float64) for _ in range(3))
    opt = getattr(xc, kind)(ours, **options, world=team)
    for step in range(2):
        give_gradients(ours, opt, step)
        opt.step()
    there = getattr(torch.optim, kind)(theirs, lr=1.0)
    there.load_state_dict(opt.state_dict())
    assert {name: there.param_groups[0][name] for name in switches} == switches
    with torch.no_grad():
        for p, master in zip(theirs, opt.state_dict()["extrapcomm"]["master"].values(), strict=True):
            p.copy_(master)
    give_mean(theirs, team.K, 2)
    there.step()
    give_gradients(ours, opt, 2)
    opt.step()
    with torch.no_grad():
        for p, now in zip(again, theirs, strict=True):
            p.copy_(now)
    saved = there.state_dict()
    back = getattr(xc, kind)(again, **{**options, "lr": 1.0}, world=team)
    back.load_state_dict(saved)
    for params, each in ((ours, opt), (again, back)):
        give_gradients(params, each, 3)
        each.step()
    give_mean(theirs, team.K, 3)
    there.step()
    for i, p in enumerate(theirs):
        np.testing.assert_allclose(opt.master(i), p.detach(), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(back.master(i), p.detach(), rtol=1e-11, atol=1e-12)
    opt.close()
    back.close()


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_state_of_other_switches_is_refused_on_all_ranks(world, name):
    params, others = parameters(), parameters()
    opt = xc.Adam(params, lr=0.1, world=world)
    there = torch.optim.Adam(others, lr=0.1, **{name: world.rank == world.size - 1})
    for p in others:
        p.grad = torch.ones_like(p)
    there.step()
    with pytest.raises(xc.UsageError, match=f"{name} cannot change"):
        opt.load_state_dict(there.state_dict())
    opt.step()
    opt.close()


def test_amsgrad_of_a_saved_state_is_refused_by_rules_without_it(world):
    opt = xc.VRAdam(parameters(), lr=0.1, world=world)
    saved = opt.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(xc.UsageError, match="'vradam' does not have amsgrad: Adam, AdamW and ExtrapAdam"):
        opt.load_state_dict(saved)
    opt.close()


def test_saved_state_that_is_differentiable_is_refused(world):
    opt = xc.SGD(parameters(), lr=0.1, world=world)
    saved = torch.optim.SGD(parameters(), lr=0.25, differentiable=True).state_dict()
    with pytest.raises(xc.UsageError, match="does not have differentiable: leave it out"):
        opt.load_state_dict(saved)
    opt.close()


@pytest.mark.parametrize("switch", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
def test_torchs_state_with_switches_of_its_own_loads(world, switch):
    params = parameters()
    opt = xc.Adam(params, lr=0.1, world=world)
    saved = torch.optim.Adam(parameters(), lr=0.25).state_dict()
    saved["param_groups"][0].update(switch)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.25
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    opt.step()
    opt.close()


# ---- amsgrad ----


def test_largest_average_stays_and_is_saved(team):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = xc.Adam([p], lr=0.1, betas=(0.0, 0.5), amsgrad=True, world=team)
    for gradient in (4.0, 0.0):
        for v in range(team.workers):
            with opt.worker(v):
                p.grad = torch.full((2,), gradient, dtype=torch.float64)
        opt.step()
    entry = opt.state_dict()["state"][0]
    assert entry["exp_avg_sq"].tolist() == [4.0] * 2
    assert entry["max_exp_avg_sq"].tolist() == [8.0] * 2
    opt.close()


def test_nan_stays_in_the_largest_average_as_in_torchs(team):
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = xc.Adam([ours], lr=0.1, amsgrad=True, world=team)
    wanted = torch.optim.Adam([theirs], lr=0.1, amsgrad=True)
    for gradient in ([1.0, float("nan"), 1.0], [1.0, 1.0, float("inf")]):
        for v in range(team.workers):
            with opt.worker(v):
                ours.grad = torch.tensor(gradient)
        theirs.grad = torch.tensor(gradient)
        opt.step()
        wanted.step()
    mine, its = opt.state_dict()["state"][0], wanted.state[theirs]
    assert mine["max_exp_avg_sq"].isnan().tolist() == [False, True, False]
    torch.testing.assert_close(mine["max_exp_avg_sq"], its["max_exp_avg_sq"], equal_nan=True)
    torch.testing.assert_close(opt.master(0), theirs.detach(), equal_nan=True)
    opt.close()


def test_displacement_divides_by_the_largest_average(team):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    options = {"lr": 0.0, "betas": (0.0, 0.5), "eps": 0.0, "inner_lr": 1.0}
    opt = xc.ExtrapAdam([p], **options, amsgrad=True, world=team)
    for gradient in (4.0, 1.0):
        for v in range(team.workers):
            with opt.worker(v):
                p.grad = torch.full((1,), gradient, dtype=torch.float64)
        opt.step()
    largest = 8.0  # then 0.5 * 8 + 0.5 * 1 = 4.5
    np.testing.assert_allclose(p.detach(), -1.0 / np.sqrt(largest / 0.75), rtol=1e-12)
    opt.close()


def test_groups_with_and_without_amsgrad_train_together(team):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)

    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:], "amsgrad": True}]

    opt = xc.Adam(groups(ours), lr=0.125, betas=(0.5, 0.5), world=team)
    wanted = torch.optim.Adam(groups(theirs), lr=0.125, betas=(0.5, 0.5))
    for step in range(STEPS):
        give_gradients(ours, opt, step)
        give_mean(theirs, team.K, step)
        opt.step()
        wanted.step()
    wanted.load_state_dict(opt.state_dict())
    for i, p in enumerate(theirs):
        np.testing.assert_allclose(opt.master(i), p.detach(), rtol=1e-11, atol=1e-12)
    opt.close()


# ---- switches without a counterpart ----


@pytest.mark.parametrize("kind", KINDS)
def test_foreach_and_fused_have_no_effect(world, kind):
    plain = trained(kind, world, **KINDS[kind])
    for foreach, fused in product((None, False, True), (None, False, True)):
        if kind in ("SGD", "Adam") or (foreach, fused) in ((True, None), (False, True)):
            assert_same(trained(kind, world, foreach=foreach, fused=fused, **KINDS[kind]), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_switch_without_a_counterpart_is_refused_on_all_ranks(world, kind, name):
    odd = world.rank == world.size - 1
    own = {"lr": 0.1, **KINDS[kind], "world": world}
    with pytest.raises(xc.UsageError, match=f"does not have {name}: leave it out"):
        getattr(xc, kind)(parameters(), **{name: odd}, **own)
    with pytest.raises(xc.UsageError, match=f"does not have {name}: leave it out"):
        getattr(xc, kind)([{"params": parameters(), name: odd}], **own)
    for off in (False, None):
        getattr(xc, kind)(parameters(), **{name: off}, **own).close()


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "Adam" not in kind or kind in ("VRAdam", "AdamP")]
)
def test_amsgrad_of_a_group_is_refused_by_rules_without_it(world, kind):
    groups = [{"params": parameters(), "amsgrad": True}]
    with pytest.raises(xc.UsageError, match="does not have amsgrad: Adam, AdamW and ExtrapAdam have it"):
        getattr(xc, kind)(groups, **{"lr": 0.1, **KINDS[kind]}, world=world)


# ---- arguments that do not exist, or are missing ----

MISTAKES = {
    "a typing error": (lambda p, own: xc.Adam(p, amsgard=True, **own), "no argument 'amsgard': did you mean 'amsgrad'"),
    "another's argument": (lambda p, own: xc.SGD(p, zzz=1, **own), "no argument 'zzz': there are .*momentum, "),
    "for a subclass": (lambda p, own: xc.ExtrapSGD(p, momentun=1, **own), "ExtrapSGD has no argument 'momentun'"),
    "for a rule on a rule": (lambda p, own: xc.VRSGD(p, gsnr_flor=1, **own), "did you mean 'gsnr_floor'"),
    "no parameters": (lambda p, own: xc.SGD(**own), "missing 1 required positional argument: 'params'"),
    "too many": (lambda p, own: xc.LANS(p, 1, (0.9, 0.9), 1, 1, 1, 1, **own), "positional arguments"),
    "twice": (lambda p, own: xc.ExtrapAdam(p, 0.1, lr=0.1, **own), "multiple values for argument 'lr'"),
    "no steps": (lambda p, own: xc.PostLocalSGD(p, 0.1, start=1, **own), "'local_steps'"),
    "parameters that are none": (lambda p, own: xc.SGD(3, **own), "TypeError|not iterable"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_argument_that_is_wrong_on_one_rank_is_an_error_on_all_at_once(world, name):
    make, text = MISTAKES[name]
    started = time.monotonic()
    with pytest.raises((xc.UsageError, TypeError), match=text) as raised:
        if world.rank == world.size - 1:
            make(parameters(), {"world": world})
        else:
            xc.SGD(parameters(), world=world)
    assert time.monotonic() - started < 10
    if name != "parameters that are none":
        assert isinstance(raised.value, xc.UsageError) and isinstance(raised.value, TypeError)


@pytest.mark.parametrize(
    "mistake",
    [{"amsgard": True}, {"lr": -1.0}, {"world": "everybody"}],
    ids=["unknown", "negative", "no world"],
)
def test_wrong_argument_without_a_world_is_an_error_on_all_at_once(worlds, mistake):
    odd = worlds(1).rank == worlds(1).size - 1
    started = time.monotonic()
    with pytest.raises(xc.UsageError, match="amsgard|lr must not|must be a World"):
        xc.Adam(parameters(), **(mistake if odd else {}))
    with pytest.raises(xc.UsageError, match="missing 1 required"):
        xc.Adam() if odd else xc.Adam(parameters())
    assert time.monotonic() - started < 10


def test_constructor_of_a_users_subclass_that_fails_on_one_rank_fails_on_all(world):
    class Mine(xc.SGD):
        def __init__(self, params, **options):
            if world.rank == world.size - 1:
                raise KeyError("no schedule")
            super().__init__(params, **options)

    with pytest.raises((xc.UsageError, KeyError), match="no schedule"):
        Mine(parameters(), world=world)
