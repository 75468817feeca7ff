"""State that leaves for torch.optim and comes back: no training is lost, whatever took the steps in between."""

import contextlib
import copy
import io
import itertools
import logging

import pytest
from conftest import COMM, TEAM
from test_ownership import net, train, values

import extrapcomm as xc

torch = pytest.importorskip("torch")

RULES = {
    "SGD": (xc.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "plain SGD": (xc.SGD, torch.optim.SGD, {"lr": 0.05}),
    "Adam": (xc.Adam, torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (xc.AdamW, torch.optim.AdamW, {"lr": 0.01}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHAINS = list(itertools.product(("ours", "torch"), repeat=3))


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


class Half(torch.nn.Module):
    """A model with a parameter that no step ever updates."""

    def __init__(self, dtype):
        super().__init__()
        self.net = net(dtype=dtype)
        self.rest = torch.nn.ParameterList([torch.ones(3, dtype=dtype)])

    @property
    def unused(self):
        return self.rest[0]

    def forward(self, x):
        return self.net(x)


def make(who, rule, model, world):
    ours, theirs, options = rule
    if who == "torch":
        return theirs(model.parameters(), **options)
    opt = ours(model.parameters(), **options, world=world)
    opt.attach(model)
    return opt


def finish(opt):
    if hasattr(opt, "close"):
        opt.close()


def still(opt, model, world):
    """A step of no length."""
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, world, steps=1, start=50)
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate


def run_chain(chain, steps, rule, dtype, world, optimizer_first):
    """The weights after the chain; each change of optimizer must leave them as they are."""
    model, start, saved = Half(dtype), 0, None
    for who, count in zip(chain, steps, strict=True):
        fresh = Half(dtype)
        opt = make(who, rule, fresh, world)
        if saved is not None:
            weights, state = saved
            if optimizer_first:
                opt.load_state_dict(state)
            fresh.load_state_dict(weights)
            if not optimizer_first:
                opt.load_state_dict(state)
            if who == "ours":
                probe = make("ours", rule, other := Half(dtype), world)
                probe.load_state_dict(state)
                other.load_state_dict(weights)
                still(probe, other, world)
                probe.close()
                for name, value in other.state_dict().items():
                    assert torch.equal(value, weights[name]), name
        model = fresh
        train(model, opt, world, steps=count, start=start)
        start += count
        saved = (copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()))
        finish(opt)
    return values(model)


@pytest.mark.parametrize("optimizer_first", [False, True], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("steps", [(0, 1, 7), (1, 7, 1), (7, 1, 0)], ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_chain_of_optimizers_trains_like_torch_alone(chain, steps, rule, world, optimizer_first):
    got = run_chain(chain, steps, rule, torch.float32, world, optimizer_first)
    wanted = run_chain(("torch",) * 3, steps, rule, torch.float32, world, False)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_first", [False, True], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("steps", [(1, 7, 1), (7, 1, 0)], ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_short_weights_of_a_chain_stay_near_float32s(chain, steps, rule, world, optimizer_first):
    got = run_chain(chain, steps, rule, torch.bfloat16, world, optimizer_first)
    wanted = run_chain(("torch",) * 3, steps, rule, torch.float32, world, False)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def through_torch(model, state, rule, count):
    """torch.optim's own steps after ours, on a copy of the model."""
    other = copy.deepcopy(model)
    opt = rule[1](other.parameters(), **rule[2])
    opt.load_state_dict(state)
    train(other, opt, None, steps=count, start=20)
    return other, opt.state_dict()


def test_training_by_torch_in_between_is_kept(rule, dtype, world, caplog):
    model = net(dtype=dtype)
    opt = make("ours", rule, model, world)
    train(model, opt, world, steps=1)
    other, state = through_torch(model, opt.state_dict(), rule, 5)
    opt.close()
    back = make("ours", rule, other, world)
    back.load_state_dict(state)
    before = values(other)
    with caplog.at_level(logging.WARNING, logger="extrapcomm"):
        still(back, other, world)
    for p, was in zip(other.parameters(), before, strict=True):
        assert torch.equal(p, was)
    warned = [r for r in caplog.records if "master weights of parameter" in r.getMessage()]
    assert len(warned) == (dtype == torch.bfloat16)
    back.close()


def test_masters_of_unknown_age_are_used_where_they_round_to_the_weights(world):
    rule = RULES["Adam"]
    model = net(dtype=torch.bfloat16)
    opt = make("ours", rule, model, world)
    train(model, opt, world, steps=3)
    masters, state = [opt.master(i) for i in range(4)], opt.state_dict()
    del state["extrapcomm"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    opt.close()
    other = net(1, dtype=torch.bfloat16)
    back = make("ours", rule, other, world)
    back.load_state_dict(state)
    weights["2.bias"] += 1
    other.load_state_dict(weights)
    seen = back.state_dict()["extrapcomm"]["master"]
    for i in range(3):
        assert torch.equal(seen[i], masters[i])
    still(back, other, world)
    for i in range(3):
        assert torch.equal(back.master(i), masters[i])
    assert torch.equal(back.master(3), weights["2.bias"].float())
    assert torch.equal(back.state_dict()["state"][0]["step"], torch.tensor(4.0))
    back.close()


def test_state_of_an_optimizer_without_steps_is_torchs(rule, dtype, world):
    model = Half(dtype)
    opt = make("ours", rule, model, world)
    fresh = opt.state_dict()
    assert fresh["state"] == {}
    theirs = rule[1](copy.deepcopy(model).parameters(), **rule[2])
    theirs.load_state_dict(fresh)
    train(model, opt, world, steps=2)
    saved = opt.state_dict()
    assert list(saved["state"]) == [0, 1, 2, 3]
    other = copy.deepcopy(model)
    theirs = rule[1](other.parameters(), **rule[2])
    theirs.load_state_dict(saved)
    train(other, theirs, None, steps=1)
    other.unused.grad = torch.ones(3, dtype=dtype)
    theirs.step()
    opt.close()


def test_later_versions_and_broken_extras_are_refused(world):
    model = net()
    opt = make("ours", RULES["SGD"], model, world)
    good = opt.state_dict()
    for extra in ({"version": 2}, {"version": "1"}, 3, {"version": 1, "local_noise": 3}):
        with pytest.raises(xc.UsageError, match="extrapcomm|local_noise"):
            opt.load_state_dict(good | {"extrapcomm": extra if world.rank == 0 else good["extrapcomm"]})
    opt.load_state_dict(good)
    opt.close()


def test_what_was_measured_travels_beside_other_checkpoints(world, caplog):
    if world.K < 2:
        pytest.skip("needs two workers")
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, gain=xc.AdaScale(), world=world)
    train(model, opt, world)
    state, extra, progress = opt.state_dict(), opt.extra_state_dict(), opt.progress
    opt.close()
    other = xc.SGD(net().parameters(), lr=0.1, gain=xc.AdaScale(), world=world)
    with caplog.at_level(logging.WARNING, logger="extrapcomm"):
        other.load_state_dict({k: v for k, v in state.items() if k != "extrapcomm"})
    assert "AdaScale" in caplog.text
    other.load_extra_state_dict(extra)
    assert other.progress == progress
    other.close()


def test_ranks_that_load_different_measurements_are_told(world):
    if world.size < 2:
        pytest.skip("needs two ranks to differ")
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr="noise", world=world)
    train(model, opt, world)
    extra = opt.extra_state_dict()
    if world.rank == 1:
        extra["local_noise"]["square"] += 1.0
    opt.load_extra_state_dict(extra)
    for _ in range(2):
        with pytest.raises(xc.MismatchError, match="load_extra_state_dict"):
            train(model, opt, world, steps=1)
    opt.load_extra_state_dict(opt.extra_state_dict() | {"local_noise": {"variance": 1.0, "square": 2.0}})
    train(model, opt, world, steps=2)
    opt.close()


# -- torch's hooks ---------------------------------------------------------------------------------------------------


def test_torchs_hooks_see_and_change_the_whole_dict(world):
    model = net()
    opt = make("ours", RULES["Adam"], model, world)
    train(model, opt, world)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda o, d: seen.append(sorted(d["state"][0])))
    opt.register_state_dict_post_hook(lambda o, d: d | {"mine": 1})
    saved = opt.state_dict()
    assert seen == ["pre", ["exp_avg", "exp_avg_sq", "step"]]
    assert saved["mine"] == 1

    def first(o, d):
        d = copy.deepcopy(d)
        d["state"][0]["exp_avg"].fill_(7)
        return d

    opt.register_load_state_dict_pre_hook(first)
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.load_state_dict(saved)
    assert seen[-1] == "loaded"
    assert opt.state_dict()["state"][0]["exp_avg"].eq(7).all()
    assert not saved["state"][0]["exp_avg"].eq(7).any()
    opt.close()


def test_hook_that_fails_on_one_rank_is_an_error_on_all_and_nothing_is_loaded(world):
    model = net()
    opt = make("ours", RULES["Adam"], model, world)
    saved = opt.state_dict()
    train(model, opt, world)
    before = values(model)

    def fail(o, d):
        if world.rank == world.size - 1:
            raise KeyError("no such thing")

    handle = opt.register_load_state_dict_pre_hook(fail)
    with pytest.raises((xc.UsageError, KeyError), match="no such thing"):
        opt.load_state_dict(saved)
    handle.remove()
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    opt.load_state_dict(saved)
    opt.close()


# -- torch.distributed.checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_dcp_brings_a_trained_optimizer_into_one_that_never_stepped(rule, dtype, world, flat):
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Half(dtype)
    opt = make("ours", rule, model, world)
    train(model, opt, world)
    weights = {k: v.clone() for k, v in dcp.get_model_state_dict(model).items()}
    state = dcp.get_optimizer_state_dict(model, opt, options=options)
    other = Half(dtype)
    resumed = make("ours", rule, other, world)
    template = dcp.get_optimizer_state_dict(other, resumed, options=options)
    if flat:
        assert {k for k in template if k.startswith("state.")} == {k for k in state if k.startswith("state.")}
    else:
        assert {k: set(v) for k, v in template["state"].items()} == {
            k: set(v) for k, v in state["state"].items()
        }
    dcp.set_optimizer_state_dict(other, resumed, state, options=options)
    dcp.set_model_state_dict(other, weights)
    train(model, opt, world, steps=5, start=9)
    train(other, resumed, world, steps=5, start=9)
    for i in range(5):
        assert torch.equal(resumed.master(i), opt.master(i)), i
        assert torch.equal(list(other.parameters())[i], list(model.parameters())[i])
    assert list(resumed.state_dict()["state"]) == [0, 1, 2, 3]
    opt.close()
    resumed.close()


def test_dcp_on_one_rank_alone_takes_no_step(worlds):
    world = worlds(1)
    if len(world.teams) > 1:
        pytest.skip("between hosts state_dict() is collective")
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = net()
    opt = make("ours", RULES["Adam"], model, world)
    if world.rank == 0:
        assert dcp.get_optimizer_state_dict(model, opt)["state"]["0.weight"]["step"] == 0
    assert opt._core.steps == 0
    train(model, opt, world, steps=1)
    opt.close()


def test_dcp_files_are_loaded_into_an_optimizer_that_never_stepped(tmp_path, virtual):
    import torch.distributed.checkpoint as files
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    world = virtual(1)
    model = Half(torch.bfloat16)
    opt = make("ours", RULES["Adam"], model, world)
    train(model, opt, world)
    weights, state = get_state_dict(model, opt)
    files.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    other = Half(torch.bfloat16)
    resumed = make("ours", RULES["Adam"], other, world)
    weights, state = get_state_dict(other, resumed)
    files.load({"model": weights, "optim": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    train(model, opt, world, steps=2, start=9)
    train(other, resumed, world, steps=2, start=9)
    for i in range(5):
        assert torch.equal(resumed.master(i), opt.master(i)), i
    opt.close()
    resumed.close()


# -- optimizer.state -------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(rule, world):
    model = Half(torch.float32)
    opt = make("ours", rule, model, world)
    train(model, opt, world)
    yield model, opt, world
    opt.close()


@pytest.fixture
def adam(world):
    model = Half(torch.float32)
    opt = make("ours", RULES["Adam"], model, world)
    train(model, opt, world)
    yield model, opt, world
    opt.close()


def test_state_has_an_entry_for_each_parameter_without_any_communication(trained):
    model, opt, _ = trained
    params = list(model.parameters())
    assert opt.state and len(opt.state) == 5
    assert all(a is b for a, b in zip(opt.state, params, strict=True))
    assert params[0] in opt.state and torch.ones(1) not in opt.state
    assert "state" not in opt.__dict__
    assert all("step" in entry for entry in map(opt.state.__getitem__, params))
    with opt.collected_state():
        assert opt.state[params[0]]["step"] == 3 and opt.state[model.unused]["step"] == 0
        for name, value in opt.state[model.unused].items():
            assert not value.any(), name
        for i, param in enumerate(params[:4]):
            for name, value in opt.state[param].items():
                assert torch.equal(value, opt.state_dict()["state"][i][name])


def test_state_is_read_inside_collected_state_on_several_hosts(adam):
    model, opt, world = adam
    if len(world.teams) < 2:
        pytest.skip("needs several teams")
    with pytest.raises(xc.UsageError, match="collected_state"):
        opt.state[model.unused]["step"]


def test_assigned_state_takes_effect_at_the_next_step(adam):
    model, opt, world = adam
    wanted = copy.deepcopy(model)
    theirs = torch.optim.Adam(wanted.parameters(), **RULES["Adam"][2])
    theirs.load_state_dict(opt.state_dict())
    with opt.collected_state():
        for o, m in ((opt, model), (theirs, wanted)):
            p = next(iter(m.parameters()))
            o.state[p]["exp_avg"] = torch.full_like(p, 0.5)
            o.state[p]["step"] = torch.tensor(1.0)
    assert opt.state_dict()["state"][0]["exp_avg"].eq(0.5).all()
    train(model, opt, world, start=7)
    train(wanted, theirs, None, start=7)
    for a, b in zip(values(model), values(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with opt.collected_state():
        assert opt.state[next(iter(model.parameters()))]["step"] == 4


FRESH = {
    "clear": lambda opt, params: opt.state.clear(),
    "an empty dict": lambda opt, params: setattr(opt, "state", {}),
    "deletions": lambda opt, params: [opt.state.__delitem__(p) for p in params],
    "pop": lambda opt, params: [opt.state.pop(p, None) for p in params],
    "empty entries": lambda opt, params: [opt.state.__setitem__(p, {}) for p in params],
}


@pytest.mark.parametrize("how", FRESH)
def test_state_that_is_cleared_starts_afresh(adam, how):
    model, opt, world = adam
    wanted = copy.deepcopy(model)
    theirs = torch.optim.Adam(wanted.parameters(), **RULES["Adam"][2])
    with opt.collected_state():
        FRESH[how](opt, list(model.parameters()))
    assert opt.state_dict()["state"] == {}
    train(model, opt, world, start=7)
    train(wanted, theirs, None, start=7)
    for a, b in zip(values(model), values(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_state_assigned_on_one_rank_is_a_mismatch_on_all(adam):
    model, opt, world = adam
    if world.size < 2:
        pytest.skip("needs two ranks to differ")
    before = values(model)
    entry = {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    if world.rank == 1:
        opt.state[model.unused] = entry
    with pytest.raises(xc.MismatchError, match=r"opt\.state"):
        train(model, opt, world, steps=1)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    opt.state[model.unused] = entry
    train(model, opt, world, steps=1)


def test_copy_of_the_state_that_is_written_is_an_error_on_all_ranks(adam):
    model, opt, world = adam
    param = next(iter(model.parameters()))
    with opt.collected_state():
        for kept in (False, True):
            value = opt.state[param]["exp_avg"]
            if world.rank == world.size - 1:
                value.zero_()
            if not kept:
                del value
            with pytest.raises(xc.UsageError, match="it is a copy"):
                train(model, opt, world, steps=1)
    train(model, opt, world, steps=1)


def test_values_that_do_not_fit_the_state_are_refused_at_once(adam):
    model, opt, _ = adam
    param = next(iter(model.parameters()))
    cases = [
        lambda: opt.state.__setitem__(param, {"exp_avg": torch.zeros(3)}),
        lambda: opt.state.__setitem__(param, {"momentum_buffer": torch.zeros_like(param)}),
        lambda: opt.state.__setitem__(param, {"step": torch.tensor(-1.0)}),
        lambda: opt.state.__setitem__(param, {"step": "many"}),
        lambda: opt.state.__setitem__(param, {"step": torch.tensor(2.0)}),
        lambda: opt.state.__setitem__(param, 3),
        lambda: opt.state[param].__setitem__("max", torch.zeros_like(param)),
        lambda: setattr(opt, "state", 3),
    ]
    for case in cases:
        with pytest.raises(xc.UsageError):
            case()
    with pytest.raises(KeyError):
        opt.state[torch.ones(1)]


def test_values_that_were_changed_in_place_and_assigned_are_taken(adam):
    model, opt, world = adam
    param = next(iter(model.parameters()))
    with opt.collected_state():
        before = {key: value.clone() for key, value in opt.state[param].items()}
        opt.state[param]["exp_avg"] *= 0.5
        opt.state[param]["step"] += 1
        entry = dict(opt.state[param])
        entry["exp_avg_sq"].mul_(2)
        opt.state[param] = entry
        assert torch.equal(opt.state[param]["exp_avg"], before["exp_avg"] / 2)
        assert torch.equal(opt.state[param]["exp_avg_sq"], before["exp_avg_sq"] * 2)
        train(model, opt, world, steps=1)
        assert opt.state[param]["step"] == before["step"] + 2
        value = opt.state[param]["exp_avg"]
        opt.state[param]["exp_avg"] = value.mul_(2)
        value.mul_(2)  # after the assignment: lost
        with pytest.raises(xc.UsageError, match="it is a copy"):
            train(model, opt, world, steps=1)


def copied_by_pickle(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, copied_by_pickle])
def test_copies_of_the_state_are_plain_dictionaries(adam, copied):
    model, opt, world = adam
    with opt.collected_state():
        mine, other = opt.state, copied(opt.state)
        assert type(other) is dict and len(other) == 5
        for (param, entry), own in zip(other.items(), mine.values(), strict=True):
            assert type(entry) is dict and isinstance(param, torch.nn.Parameter)
            assert sorted(entry) == sorted(own)
            assert all(torch.equal(entry[key], own[key]) for key in own)
        if copied is copy.copy:
            other[next(iter(model.parameters()))]["exp_avg"].zero_()  # nobody's mistake
    train(model, opt, world, steps=1)


def misfits():
    """State that does not belong to a rule: its optimizer, and what is done to the saved state of parameter 0."""
    full = {"step": torch.tensor(3.0), "exp_avg": torch.ones(5, 4), "exp_avg_sq": torch.ones(5, 4)}
    without = {f"Adam without {key}": (xc.Adam, {k: v for k, v in full.items() if k != key}) for key in full}
    return without | {
        "SGD's into Adam": (xc.Adam, {"momentum_buffer": torch.ones(5, 4)}),
        "Adam's into SGD": (xc.SGD, full),
        "Adam's into LARS": (xc.LARS, full),
        "misspelt": (xc.SGD, {"momentum_bufer": torch.ones(5, 4)}),
        "misspelt beside the right ones": (xc.Adam, full | {"exp_avg_squared": torch.ones(5, 4)}),
        "AMSGrad without its maximum": (xc.Adam, full),
    }


@pytest.mark.parametrize("case", misfits())
@pytest.mark.parametrize("everywhere", [True, False], ids=["all ranks", "one rank"])
def test_state_of_another_rule_is_an_error_on_all_ranks(world, case, everywhere):
    make, entry = misfits()[case]
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 5)
    options = {"momentum": 0.9} if make is not xc.Adam else {"amsgrad": case.startswith("AMSGrad")}
    opt = make(model.parameters(), lr=0.1, world=world, **options)
    saved = opt.state_dict()
    if everywhere or world.rank == world.size - 1:
        saved["state"] = {0: entry}
    before = values(model)
    with pytest.raises(xc.UsageError, match="the state of parameter '0.0' has"):
        opt.load_state_dict(saved)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    opt.close()


LEGAL = {
    "nothing": {},
    "None for all": dict.fromkeys(("step", "momentum_buffer")),
    "empty mappings": {"step": {}, "momentum_buffer": {}},
    "torch's SGD before its first step with momentum": {"momentum_buffer": None},
    "plain SGD's": {"step": torch.tensor(3.0)},
    "torch's SGD": {"momentum_buffer": torch.ones(5, 4)},
}


@pytest.mark.parametrize("case", LEGAL)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_that_torch_itself_would_have_is_taken(world, case, momentum):
    model = torch.nn.Linear(4, 5)
    opt = xc.SGD(model.parameters(), lr=0.1, momentum=momentum, world=world)
    opt.load_state_dict(opt.state_dict() | {"state": {0: LEGAL[case]}})
    opt.close()


def test_a_maximum_that_the_rule_does_not_use_is_taken(world):
    model = torch.nn.Linear(4, 5)
    opt = xc.Adam(model.parameters(), lr=0.1, world=world)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    entry = {"step": torch.tensor(3.0)} | {name: torch.ones(5, 4) for name in names}
    opt.load_state_dict(opt.state_dict() | {"state": {0: entry}})
    opt.close()


def test_moving_the_state_as_trainers_do_changes_nothing(adam):
    model, opt, world = adam
    with opt.collected_state():
        for param, entry in opt.state.items():
            for key, value in entry.items():
                entry[key] = value.to("cpu")
            opt.state[param] = entry
    assert not opt._live.digest
    copied = copy.deepcopy(dict(opt.state_dict()["state"]))
    train(model, opt, world, steps=1)
    assert sorted(copied) == [0, 1, 2, 3]


def test_setstate_leaves_no_state_behind(adam):
    _, opt, _ = adam
    opt.__setstate__({"state": {}, "param_groups": opt.param_groups})
    assert "state" not in opt.__dict__
    assert len(opt.state) == 5


def test_state_of_closed_optimizers_can_be_read(adam):
    model, opt, world = adam
    if len(world.teams) > 1:
        pytest.skip("between hosts reading takes all ranks")
    COMM.Barrier()
    opt.close()
    assert opt.state[next(iter(model.parameters()))]["step"] == 3
    with pytest.raises(xc.UsageError, match="closed"):
        opt.state.clear()


def test_assigned_state_survives_a_new_group(adam):
    model, opt, world = adam
    param = next(iter(model.parameters()))
    with opt.collected_state():
        opt.state[param]["exp_avg"] = torch.full_like(param, 0.25)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert opt.state_dict()["state"][0]["exp_avg"].eq(0.25).all()
    train(model, opt, world, steps=1)
    with opt.collected_state():
        assert opt.state[param]["step"] == 4
        assert len(opt.state) == 6


def test_state_is_assigned_in_the_fused_phase_of_local_steps_only(world):
    model = net()
    opt = xc.PostLocalSGD(model.parameters(), lr=0.1, momentum=0.9, local_steps=4, start=1, world=world)
    param = next(iter(model.parameters()))
    train(model, opt, world, steps=1)
    with opt.collected_state():
        opt.state[param] = {"momentum_buffer": torch.zeros_like(param), "step": torch.tensor(1.0)}
    train(model, opt, world, steps=1)
    with pytest.raises(xc.UsageError, match="local steps"):
        opt.state.clear()
    opt.average()
    opt.close()


def test_one_parameters_state_is_cleared_and_keys_stay(adam):
    model, opt, world = adam
    param = next(iter(model.parameters()))
    opt.state[param].clear()
    for mapping in (opt.state, opt.state[param]):
        with pytest.raises(xc.UsageError, match="keeps"):
            mapping.popitem()
    train(model, opt, world, steps=1)
    with opt.collected_state():
        assert opt.state[param]["step"] == 1


# -- Assignments that look like nothing happened --------------------------------------------------------------------


def trained_pair(optimizer, world, **options):
    """A model and its optimizer after two steps, and what takes another step; torch's and ours are given the same."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    options |= {} if optimizer.__module__.startswith("torch") else {"world": world}
    opt = optimizer(model.parameters(), lr=0.1, **options)

    def step():
        opt.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        opt.step()

    step()
    step()
    return model, opt, step


def read_and_reset(opt, a, b, step):
    opt.state[a]["momentum_buffer"].norm()
    for p in (a, b):
        opt.state[p]["momentum_buffer"] = None


def delete(opt, a, b, step):
    del opt.state[a]["momentum_buffer"]


def copy_from_another(opt, a, b, step):
    opt.state[a]["momentum_buffer"] = opt.state[b]["momentum_buffer"].clone().add_(0)


def given_as_it_is(opt, a, b, step):
    value = opt.state[b]["momentum_buffer"]
    opt.state[a]["momentum_buffer"] = value if hasattr(opt, "world") else value.clone()


def roll_back(opt, a, b, step):
    value = opt.state[a]["momentum_buffer"]
    value = value if hasattr(opt, "world") else value.clone()
    step()
    opt.state[a]["momentum_buffer"] = value


def update(opt, a, b, step):
    value = opt.state[a]["momentum_buffer"]
    value = value if hasattr(opt, "world") else value.clone()
    step()
    opt.state[a].update({"momentum_buffer": value})


def there_and_back(opt, a, b, step):
    value = opt.state[a]["momentum_buffer"]
    kept = value if hasattr(opt, "world") else value.clone()
    opt.state[a]["momentum_buffer"] = torch.zeros(3, 3)
    opt.state[a]["momentum_buffer"] = kept


EDITS = (read_and_reset, delete, copy_from_another, given_as_it_is, roll_back, update, there_and_back)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_momentum_are_torchs(world, edit, dampening):
    if len(world.teams) > 1:
        pytest.skip("the state of several hosts is read in collected_state()")
    results = []
    for optimizer in (torch.optim.SGD, xc.SGD):
        model, opt, step = trained_pair(optimizer, world, momentum=0.9, dampening=dampening)
        edit(opt, model[0].weight, model[1].weight, step)
        step()
        step()
        results.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loaded_state_without_a_buffer_begins_with_the_next_gradient(world):
    results = []
    for optimizer in (torch.optim.SGD, xc.SGD):
        model, opt, step = trained_pair(optimizer, world, momentum=0.9, dampening=0.5)
        with opt.collected_state() if hasattr(opt, "world") else contextlib.nullcontext():
            saved = opt.state_dict()
        for entry in saved["state"].values():
            entry["momentum_buffer"] = None
        opt.load_state_dict(saved)
        step()
        results.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- Weights that were loaded and not adopted yet -------------------------------------------------------------------


def halves(model):
    return {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}


def test_a_checkpoint_between_loading_and_the_next_step_has_what_was_loaded(world, dtype):
    model = net(dtype=dtype)
    opt = make("ours", RULES["SGD"], model, world)
    train(model, opt, world)
    model.load_state_dict(halves(model))
    with opt.collected_state():
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, world, steps=1)
    assert all((value == 0.5).all() for value in saved[0].values())  # copies
    fresh = net(dtype=dtype)
    other = make("ours", RULES["SGD"], fresh, world)
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    still(other, fresh, world)
    for i in range(len(list(fresh.parameters()))):
        with other.master_weights():
            assert (list(fresh.parameters())[i] == 0.5).all()
    opt.close()
    other.close()


@pytest.mark.parametrize("model_first", [True, False])
def test_the_models_loaded_weights_count_beside_an_older_state(world, caplog, model_first):
    model = net()
    opt = make("ours", RULES["SGD"], model, world)
    train(model, opt, world)
    with opt.collected_state():
        older = copy.deepcopy(opt.state_dict())
    train(model, opt, world)
    loads = [lambda: model.load_state_dict(halves(model)), lambda: opt.load_state_dict(older)]
    for load in loads if model_first else reversed(loads):
        load()
    still(opt, model, world)
    assert all((p == 0.5).all() for p in model.parameters())
    assert ("are not those of the model" in caplog.text) is model_first
    opt.close()


@pytest.mark.parametrize("model_first", [True, False])
def test_short_weights_keep_their_masters_in_either_order(world, model_first):
    model = net(dtype=torch.bfloat16)
    opt = make("ours", RULES["SGD"], model, world)
    train(model, opt, world)
    with opt.collected_state():
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    wanted = [opt.master(i) for i in range(len(opt.state))]
    opt.close()
    fresh = (
        net(seed=1, dtype=torch.bfloat16) if "seed" in net.__code__.co_varnames else net(dtype=torch.bfloat16)
    )
    other = make("ours", RULES["SGD"], fresh, world)
    loads = [lambda: fresh.load_state_dict(saved[0]), lambda: other.load_state_dict(saved[1])]
    for load in loads if model_first else reversed(loads):
        load()
    with other.collected_state():
        again = other.state_dict()["extrapcomm"]["master"]
    assert all(torch.equal(again[i], w) for i, w in enumerate(wanted))
    still(other, fresh, world)
    assert all(torch.equal(other.master(i), w) for i, w in enumerate(wanted))
    other.close()


@pytest.mark.parametrize("how", ["numpy", "data"])
def test_values_written_unseen_and_assigned_are_taken(adam, how):
    model, opt, world = adam
    param = next(iter(model.parameters()))
    with opt.collected_state():
        value = opt.state[param]["exp_avg"]
        if how == "numpy":
            value.numpy()[:] = 0
        else:
            value.data.zero_()
        opt.state[param]["exp_avg"] = value
        assert not opt.state[param]["exp_avg"].any()
    train(model, opt, world, steps=1)


# -- Entries that are staged, and copies in a state_dict ------------------------------------------------------------

inside_one_team = pytest.mark.skipif(bool(TEAM), reason="opt.state is read inside one team, or collected")


def dampened(kind, world=None):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.ones(3))
    more = {} if world is None else {"world": world}
    return param, kind([param], lr=0.1, momentum=0.9, dampening=0.5, **more)


def take_steps(param, opt, number):
    for _ in range(number):
        opt.zero_grad()
        (param * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        opt.step()


@inside_one_team
@pytest.mark.parametrize("then", ["edit", "save and load", "save"])
def test_a_staged_entry_of_torchs_form_keeps_its_momentum(world, then):
    """torch's SGD has no count of steps in its entries."""
    weights, saved = [], []
    for kind, where in ((torch.optim.SGD, None), (xc.SGD, world)):
        param, opt = dampened(kind, where)
        take_steps(param, opt, 2)
        opt.state[param] = {"momentum_buffer": torch.full((3,), 5.0)}
        if then == "edit":
            opt.state[param]["momentum_buffer"] *= 0.5
        state = opt.state_dict()
        saved.append(state["state"][0]["momentum_buffer"].clone())
        if then == "save and load":
            opt.load_state_dict(state)
        take_steps(param, opt, 1)
        weights.append(param.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(saved[0], saved[1])
    opt.close()


def test_a_state_dict_holds_copies_that_others_may_write(world):
    """Another optimizer that loads the dict takes its tensors as they are, and writes there."""
    param, opt = dampened(xc.SGD, world)
    take_steps(param, opt, 1)
    other = torch.nn.Parameter(param.detach().clone())
    torchs = torch.optim.SGD([other], lr=0.1, momentum=0.9, dampening=0.5)
    torchs.load_state_dict(opt.state_dict())
    for each in (opt, torchs):
        take_steps(param if each is opt else other, each, 2)
    torch.testing.assert_close(param, other)
    state = opt.state_dict()
    state["state"][0]["momentum_buffer"].zero_()
    assert opt.state_dict()["state"][0]["momentum_buffer"].any()
    opt.load_state_dict(state)
    assert not opt.state_dict()["state"][0]["momentum_buffer"].any()
    opt.close()


def restore(opt, p, entry):
    opt.state[p] = entry


MOVES = {
    "pop and put back": lambda opt, p, q: restore(opt, p, opt.state.pop(p)),
    "pop one for the other": lambda opt, p, q: restore(opt, q, opt.state.pop(p)),
    "take, delete, put back": lambda opt, p, q: [e := opt.state[p], opt.state.pop(p), restore(opt, p, e)],
    "keep all, clear, update": lambda opt, p, q: [
        e := dict(opt.state),
        opt.state.clear(),
        opt.state.update(e),
    ],
    "keep all by items": lambda opt, p, q: [
        e := {k: v for k, v in opt.state.items()},  # noqa: C416
        opt.state.clear(),
        opt.state.update(e),
    ],
    "exchange": lambda opt, p, q: [
        one := opt.state[p],
        other := opt.state[q],
        restore(opt, p, other),
        restore(opt, q, one),
    ],
    "nothing": lambda opt, p, q: None,
}


@inside_one_team
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("move", MOVES)
def test_entries_that_are_taken_out_keep_their_values(world, move, name):
    outcome = []
    for library, more in ((torch.optim, {}), (xc, {"world": world})):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        opt = getattr(library, name)(params, lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}), **more)
        for size in (1.0, 2.0, 0.0):
            if size == 0:
                MOVES[move](opt, *params)
            for i, param in enumerate(params):
                param.grad = torch.full((2,), size * 10**i)
            opt.step()
        outcome.append([param.detach().clone() for param in params])
    torch.testing.assert_close(outcome[0], outcome[1])
    opt.close()


@inside_one_team
def test_an_entry_that_came_back_is_live_again(world):
    param, opt = dampened(xc.SGD, world)
    take_steps(param, opt, 1)
    entry = opt.state[param]
    del opt.state[param]
    before = entry["momentum_buffer"].clone()
    assert before.any() and not opt.state[param]["momentum_buffer"].any()
    opt.state[param] = entry
    entry["momentum_buffer"] = 2 * before
    torch.testing.assert_close(opt.state[param]["momentum_buffer"], 2 * before)
    take_steps(param, opt, 1)
    opt.close()


@inside_one_team
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_momentum_of_zeros_is_more_than_none(world, dampening):
    """torch takes the first gradient undamped only where there is no buffer."""
    outcome = []
    for kind, more in ((torch.optim.SGD, {}), (xc.SGD, {"world": world})):
        param = torch.nn.Parameter(torch.zeros(3))
        opt = kind([param], lr=1.0, momentum=0.9, dampening=dampening, **more)
        opt.state[param]["momentum_buffer"] = torch.zeros(3)
        param.grad = torch.ones(3)
        opt.step()
        outcome.append(param.detach().clone())
    torch.testing.assert_close(*outcome)
    opt.close()


@inside_one_team
def test_what_is_staged_may_be_read_and_written_in_inference_mode(world):
    param, opt = dampened(xc.SGD, world)
    take_steps(param, opt, 1)
    with torch.inference_mode():
        opt.state[param] = {"momentum_buffer": torch.full((3,), 5.0)}
        assert opt.state_dict()["state"][0]["momentum_buffer"].eq(5).all()
        assert opt.state[param]["momentum_buffer"].eq(5).all()
    opt.state[param]["momentum_buffer"] *= 2
    assert opt.state_dict()["state"][0]["momentum_buffer"].eq(10).all()
    take_steps(param, opt, 1)
    opt.close()


@inside_one_team
@pytest.mark.parametrize("step", [1.5, "3", True, float("nan"), -1, torch.tensor(2.5)], ids=str)
def test_a_count_that_is_none_is_refused(world, step):
    param = torch.nn.Parameter(torch.ones(3))
    opt = xc.Adam([param], lr=0.1, world=world)
    take_steps(param, opt, 1)
    with pytest.raises(xc.UsageError, match="step must"):
        opt.state[param]["step"] = step
    with pytest.raises(xc.UsageError, match="dense tensor"):
        opt.state[param]["exp_avg"] = torch.zeros(3).to_sparse()
    take_steps(param, opt, 1)
    opt.close()


def clear_and_set(opt, p):
    entry = opt.state[p]
    entry.clear()
    entry["momentum_buffer"] = torch.full((3,), 4.0)


def clear_and_update(opt, p):
    entry = opt.state[p]
    kept = dict(entry)
    entry.clear()
    entry.update(kept)


def two_looks(opt, p):
    one, other = opt.state[p], opt.state[p]
    del opt.state[p]
    one["momentum_buffer"] = torch.full((3,), 4.0)
    opt.state[p] = other


def merged(opt, p):
    opt.state[p] |= {"momentum_buffer": torch.full((3,), 4.0)}
    opt.state |= {p: opt.state[p]}


def moved(opt, p):
    for entry in opt.state.values():
        for key, value in entry.items():
            entry[key] = value.to("cpu")


def refused_then_written(opt, p):
    entry = opt.state[p]
    if isinstance(opt, xc.SGD):
        with pytest.raises(xc.UsageError):
            opt.state[p] = {"momentum_buffer": torch.ones(7)}
    entry["momentum_buffer"] = torch.full((3,), 4.0)


@inside_one_team
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "change", [clear_and_set, clear_and_update, two_looks, merged, moved, refused_then_written]
)
def test_entries_that_users_hold_are_torchs(world, change, steps):
    if steps == 0 and change is two_looks:
        pytest.skip("torch has no entry before the first step")
    outcome = []
    for kind, where in ((torch.optim.SGD, None), (xc.SGD, world)):
        param, opt = dampened(kind, where)
        take_steps(param, opt, steps)
        change(opt, param)
        take_steps(param, opt, 2)
        outcome.append(param.detach().clone())
    torch.testing.assert_close(*outcome)
    opt.close()


@inside_one_team
def test_a_tensor_of_an_entry_that_came_back_is_watched(world):
    param, opt = dampened(xc.SGD, world)
    take_steps(param, opt, 1)
    entry = opt.state[param]
    del opt.state[param]
    buffer = entry["momentum_buffer"]
    opt.state[param] = entry
    buffer.mul_(4)
    with pytest.raises(xc.UsageError, match="written in place"):
        take_steps(param, opt, 1)
    opt.close()


@pytest.mark.skipif(not TEAM, reason="needs several teams")
def test_entries_may_be_held_where_they_cannot_be_read(world):
    param, opt = dampened(xc.SGD, world)
    take_steps(param, opt, 1)
    entry = opt.state[param]
    opt.state[param].clear()
    del opt.state[param]
    with pytest.raises(xc.UsageError, match="collected_state"):
        entry["momentum_buffer"]
    take_steps(param, opt, 1)
    opt.close()


def assign_collected(opt, param):
    with opt.collected_state():
        opt.state[param]["momentum_buffer"] = torch.ones_like(param)


STAGED = {
    "assigned": assign_collected,
    "cleared": lambda opt, _: opt.state.clear(),
    "loaded": lambda opt, _: opt.load_state_dict(
        {key: value for key, value in opt.state_dict().items() if key != "extrapcomm"}
    ),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("stage", STAGED)
def test_staged_state_does_not_hide_writes_into_the_weights(world, stage, dtype):
    """As after re-initialising units together with their moments."""
    model = net(dtype=dtype)
    opt = xc.SGD(model.parameters(), lr=0.05, momentum=0.9, world=world)
    train(model, opt, world)
    STAGED[stage](opt, model[0].weight)
    if world.rank == world.size - 1:
        with torch.no_grad():
            model[0].weight.fill_(100.0)
    with pytest.raises(xc.UsageError, match=r"was written.*adopt"):
        train(model, opt, world, steps=1)
    opt.adopt()
    train(model, opt, world, steps=1)
    opt.close()


VIEWS = {
    "row": lambda copy: copy[0].zero_(),
    "flat": lambda copy: copy.view(-1)[:3].fill_(2),
    "transposed": lambda copy: copy.t().zero_(),
    "detached": lambda copy: copy.detach().mul_(2),
}


@inside_one_team
@pytest.mark.parametrize("write", VIEWS)
def test_writes_through_a_view_of_a_copy_are_noticed(world, write):
    model = net()
    opt = xc.Adam(model.parameters(), lr=0.05, world=world)
    train(model, opt, world)
    view = opt.state[model[0].weight]["exp_avg"][:2]  # another one, into which nobody writes
    VIEWS[write](opt.state[model[0].weight]["exp_avg"])
    with pytest.raises(xc.UsageError, match=r"\['exp_avg'\] was written in place"):
        train(model, opt, world, steps=1)
    train(model, opt, world, steps=1)
    assert view.shape == (2, 7)
    opt.close()


@inside_one_team
def test_a_restarted_bias_correction_keeps_its_moments(world):
    """A count of 0 with moments, as torch has it, is saved and loaded."""
    models = [net(), net()]
    theirs, ours = (
        torch.optim.Adam(models[0].parameters(), lr=0.01),
        xc.Adam(models[1].parameters(), lr=0.01, world=world),
    )
    for model, opt in zip(models, (theirs, ours), strict=True):
        train(model, opt, world)
        for p in model.parameters():
            opt.state[p]["step"] = torch.tensor(0.0)
    for _ in range(2):
        saved = ours.state_dict()
        assert [entry["step"].item() for entry in saved["state"].values()] == [0.0] * 4
        ours.load_state_dict(saved)
    for model, opt in zip(models, (theirs, ours), strict=True):
        train(model, opt, world, start=3)
    for a, b in zip(*map(values, models), strict=True):
        torch.testing.assert_close(a, b)
    ours.close()


@inside_one_team
@pytest.mark.parametrize("how", ["replace", "update"])
def test_a_mapping_of_which_one_entry_does_not_fit_changes_nothing(world, how):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.05, momentum=0.9, world=world)
    train(model, opt, world)
    before = [opt.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    given = {p: {"momentum_buffer": torch.ones_like(p)} for p in model.parameters()}
    given[model[2].bias] = {"exp_avg": torch.ones(3)}
    with pytest.raises(xc.UsageError, match="exp_avg"):
        if how == "replace":
            opt.state = given
        else:
            opt.state.update(given)
    for p, buffer in zip(model.parameters(), before, strict=True):
        assert torch.equal(opt.state[p]["momentum_buffer"], buffer)
    opt.close()


@inside_one_team
def test_the_state_is_copied_and_compared_as_a_dictionary(world):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.05, momentum=0.9, world=world)
    train(model, opt, world)
    copied = opt.state.copy()
    assert isinstance(copied, dict) and list(copied) == list(model.parameters())
    copied[model[0].weight]["momentum_buffer"].zero_()
    assert opt.state == opt.state and opt.state != {} and opt.state != copied
    train(model, opt, world, steps=1)
    opt.close()


def at_once(opt):
    return opt


def loaded_back(opt):
    opt.load_state_dict(opt.state_dict())
    return opt


def another(kind, opt, **more):
    params = [p.detach().clone().requires_grad_() for group in opt.param_groups for p in group["params"]]
    return kind(params, lr=0.1, momentum=0.5, dampening=0.5, **more)


def loaded_by_torch(opt):
    other = another(torch.optim.SGD, opt)
    other.load_state_dict(opt.state_dict())
    return other


def loaded_as_local_state(opt):
    other = another(xc.SGD, opt, world=opt.world)
    other.load_local_state_dict(opt.local_state_dict())
    return other


def with_another_group(opt):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    return opt


def loaded_elsewhere(opt):
    other = another(xc.SGD, opt, world=opt.world)
    other.load_state_dict(opt.state_dict())
    return other


# Steps of parameters a and b: (momentum, dampening, b has a gradient).
LATE_MOMENTA = {
    "from zero": [(0.0, 0.5, 1), (0.9, 0.5, 1), (0.9, 0.5, 1)],
    "b begins between": [(0.9, 0.5, 0), (0.0, 0.5, 1), (0.9, 0.5, 1), (0.9, 0.5, 1)],
    "dampened later": [(0.0, 0.0, 1), (0.9, 0.0, 0), (0.9, 0.5, 1), (0.9, 0.5, 1)],
    "away and back": [(0.9, 0.5, 1), (0.0, 0.5, 1), (0.0, 0.5, 1), (0.9, 0.5, 1)],
    "zero throughout": [(0.0, 0.5, 1), (0.0, 0.5, 1)],
}


@pytest.mark.parametrize(
    "then",
    [at_once, loaded_back, loaded_elsewhere, loaded_by_torch, loaded_as_local_state, with_another_group],
)
@pytest.mark.parametrize("momenta", LATE_MOMENTA.values(), ids=LATE_MOMENTA)
def test_a_momentum_that_comes_back_from_zero_is_torchs(world, momenta, then):
    """torch begins each parameter's buffer, undamped, with its first gradient at a momentum above zero."""
    theirs, ours = (
        kind([torch.nn.Parameter(torch.ones(2)) for _ in "ab"], lr=0.1, momentum=0.5, **more)
        for kind, more in [(torch.optim.SGD, {}), (xc.SGD, {"world": world})]
    )
    opened = [ours]
    for i, (momentum, dampening, both) in enumerate(momenta):
        if i == len(momenta) - 1:
            if then is with_another_group and not momenta[i - 1][0]:
                ours.param_groups[0]["momentum"] = momentum  # an engine is made anew, with room for it
            ours = then(ours)
            opened.append(ours)
        for opt in (theirs, ours):
            opt.param_groups[0].update(momentum=momentum, dampening=dampening, lr=0.1 / (1 + i))
            opt.zero_grad()
            for param in opt.param_groups[0]["params"][: 1 + both]:
                param.grad = torch.full_like(param, 1.0 + i)
            opt.step()
    for a, b in zip(*(values_of(opt.param_groups[0]["params"]) for opt in (theirs, ours)), strict=True):
        torch.testing.assert_close(a, b)
    if not TEAM:
        with_buffers = [
            [i for i, entry in opt.state_dict()["state"].items() if entry.get("momentum_buffer") is not None]
            for opt in (theirs, ours)
        ]
        assert with_buffers[0] == with_buffers[1]
    for opt in opened:
        if isinstance(opt, xc.SGD):
            opt.close()


def values_of(params):
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("skip", ["no gradient", "not finite"])
def test_a_step_at_zero_momentum_that_changes_nothing_begins_nothing(world, skip):
    param = torch.nn.Parameter(torch.ones(2))
    opt = xc.SGD([param], lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True, world=world)
    for momentum, grad in [(0.0, None if skip == "no gradient" else float("nan")), (0.9, 1.0), (0.9, 1.0)]:
        opt.param_groups[0]["momentum"] = momentum
        param.grad = None if grad is None else torch.full_like(param, grad)
        opt.step()
    torch.testing.assert_close(param.detach(), torch.full((2,), 1 - 0.1 * (1 + 1.4)))
    opt.close()


def test_counts_of_updates_without_momentum_are_saved(world):
    """They say which random numbers come next, and when local steps begin."""
    shown = []
    for resumed in (False, True):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in "ab"]
        groups = [{"params": params[:1]}, {"params": params[1:], "momentum": 0.0}]
        kind = {"lr": 0.1, "momentum": 0.9, "extrapolation": "gaussian", "inner_lr": 0.1, "world": world}
        opt = xc.SGD(groups, **kind)
        for i in range(4):
            if resumed and i == 3:
                saved = opt.state_dict()
                opt.close()
                opt = xc.SGD([{**group, "params": group["params"]} for group in opt.param_groups], **kind)
                opt.load_state_dict(saved)
            for param in params:
                param.grad = torch.ones(4)
            opt.step()
        shown.append(values_of(params))
        opt.close()
    for a, b in zip(*shown, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("then", ["added", "resumed"])
def test_steps_before_local_ones_count_at_zero_momentum(world, then):
    param = torch.nn.Parameter(torch.ones(2))
    opt = xc.PostLocalSGD([param], lr=0.1, momentum=0.9, local_steps=4, start=5, world=world)
    opt.param_groups[0]["momentum"] = 0.0
    for _ in range(4):
        param.grad = torch.ones(2)
        opt.step()
    if then == "added":
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "momentum": 0.0})
    else:
        opt.load_state_dict(opt.state_dict())
    param.grad = torch.ones(2)
    opt.step()
    assert opt.local
    opt.close()


def test_local_steps_at_zero_momentum_begin_nothing(world):

    def made(param):
        return xc.PostLocalSGD(
            [param], lr=0.1, momentum=0.9, dampening=0.5, local_steps=2, start=1, world=world
        )

    param = torch.nn.Parameter(torch.ones(2))
    opt = made(param)
    opt.param_groups[0]["momentum"] = 0.0
    for _ in range(5):
        param.grad = torch.ones(2)
        opt.step()
    opt.average()
    saved = opt.state_dict()
    opt.close()
    opt = made(param)
    opt.load_state_dict(saved)
    opt.param_groups[0]["momentum"] = 0.9
    for _ in range(2):
        param.grad = torch.ones(2)
        opt.step()
    opt.average()
    torch.testing.assert_close(param.detach(), torch.full((2,), 1 - 0.5 - 0.1 - 0.1 * (0.9 + 0.5)))
    opt.close()


@pytest.mark.skipif(bool(TEAM), reason="opt.state is read inside one team, or collected")
@pytest.mark.parametrize("drop", ["value", "all"])
@pytest.mark.parametrize("write", [False, True])
def test_a_momentum_that_is_taken_out_and_put_back_counts(world, drop, write):
    outcome = []
    for kind, more in ((torch.optim.SGD, {}), (xc.SGD, {"world": world})):
        param = torch.nn.Parameter(torch.ones(3))
        opt = kind([param], lr=1.0, momentum=0.5, **more)
        take_steps(param, opt, 1)
        buffer = opt.state[param]["momentum_buffer"]
        if drop == "value":
            del opt.state[param]["momentum_buffer"]
        else:
            opt.state.clear()
        if write:
            buffer.mul_(0.5)
        opt.state[param]["momentum_buffer"] = buffer
        take_steps(param, opt, 2)
        outcome.append(param.detach().clone())
    torch.testing.assert_close(*outcome)
    opt.close()
