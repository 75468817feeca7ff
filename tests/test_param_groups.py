"""param_groups that were edited by hand are an error on all ranks that names the group, and never train wrongly."""

import copy

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

OPTIMIZERS = {
    "SGD": lambda groups, world, **more: xc.SGD(groups, lr=0.1, momentum=0.9, world=world, **more),
    "ExtrapSGD": lambda groups, world, **more: xc.ExtrapSGD(groups, lr=0.1, world=world, **more),
    "Adam": lambda groups, world, **more: xc.Adam(groups, lr=0.1, world=world, **more),
    "PostLocalSGD": lambda groups, world, **more: xc.PostLocalSGD(
        groups, lr=0.1, local_steps=2, start=0, world=world, **more
    ),
}


def parameters():
    return [torch.nn.Parameter(torch.full((n,), float(n))) for n in (4, 3, 4)]


def groups_of(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]


def replace_first(groups):
    groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(4))


def exchange(groups):
    groups[0]["params"][0], groups[1]["params"][0] = groups[1]["params"][0], groups[0]["params"][0]


def make_iterator(groups):
    groups[1]["params"] = iter(groups[1]["params"])


# The edits, each with the words of its error.
EDITS = {
    "reversed": (
        lambda groups: groups.reverse(),
        r"param_groups\[0\] has '1.0' of group 1 as its parameter 0",
    ),
    "popped": (lambda groups: groups.pop(), r"param_groups\[1\] is missing: there are 1 of 2 groups"),
    "cleared": (lambda groups: groups.clear(), r"param_groups\[0\] is missing"),
    "doubled": (lambda groups: groups.append(groups[0]), r"param_groups\[2\] was added by hand"),
    "first twice": (
        lambda groups: groups[0]["params"].__setitem__(1, groups[0]["params"][0]),
        r"param_groups\[0\] has '0.0' of group 0 as its parameter 1",
    ),
    "replaced": (replace_first, r"param_groups\[0\] has a tensor that is not trained as its parameter 0"),
    "exchanged": (exchange, r"param_groups\[0\] has '1.0' of group 1 as its parameter 0"),
    "removed": (lambda groups: groups[0]["params"].pop(), r"param_groups\[0\] has 1 parameters instead of 2"),
    "emptied": (
        lambda groups: groups[1]["params"].clear(),
        r"param_groups\[1\] has 0 parameters instead of 1",
    ),
    "appended": (
        lambda groups: groups[1]["params"].append(torch.nn.Parameter(torch.ones(1))),
        r"param_groups\[1\] has 2 parameters instead of 1",
    ),
    "iterator": (make_iterator, r"param_groups\[1\] has a list_iterator instead of a list as 'params'"),
    "no params": (lambda groups: groups[1].pop("params"), r"param_groups\[1\] has no 'params'"),
    "no dict": (lambda groups: groups.__setitem__(1, 5), r"param_groups\[1\] has no 'params'"),
}


def gradients(params, world, opt):
    for v in range(world.workers):
        with opt.worker(v):
            for p in params:
                p.grad = torch.ones_like(p)


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.mark.parametrize("edit", EDITS)
def test_edited_groups_are_refused_on_all_ranks_and_repaired_ones_train_on(team, make, edit):
    change, text = EDITS[edit]
    params = parameters()
    opt = make(groups_of(params), team)
    gradients(params, team, opt)
    opt.step()
    before = [opt.master(i) for i in range(3)]
    whole = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    if team.rank == team.size - 1:
        change(opt.param_groups)
    with pytest.raises(xc.UsageError, match=text + r".*add_param_group\(\)"):
        if getattr(opt, "local", False) and team.rank != team.size - 1:
            opt.average()  # a local step meets nobody
        else:
            opt.step()
    assert all(torch.equal(opt.master(i), w) for i, w in enumerate(before))
    opt.param_groups = whole
    gradients(params, team, opt)
    opt.step()
    opt.close()


@pytest.mark.parametrize("edit", ["reversed", "replaced", "popped", "no params"])
def test_edited_groups_are_neither_saved_nor_loaded_nor_enlarged(team, edit):
    params = parameters()
    opt = OPTIMIZERS["SGD"](groups_of(params), team)
    gradients(params, team, opt)
    opt.step()
    saved, local = copy.deepcopy(opt.state_dict()), opt.local_state_dict()
    change, text = EDITS[edit]
    whole = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    change(opt.param_groups)
    more = {"params": [torch.nn.Parameter(torch.ones(2))]}
    for call in (
        opt.state_dict,
        opt.local_state_dict,
        lambda: opt.load_state_dict(saved),
        lambda: opt.load_local_state_dict(local),
        lambda: opt.add_param_group(more),
    ):
        with pytest.raises(xc.UsageError, match=text):
            call()
    opt.param_groups = whole
    opt.load_state_dict(saved)
    opt.add_param_group(more)
    gradients([*params, more["params"][0]], team, opt)
    opt.step()
    opt.close()


def test_other_lists_and_dicts_of_the_same_parameters_are_fine(team):
    params = parameters()
    opt = OPTIMIZERS["SGD"](groups_of(params), team)
    opt.param_groups = [{**group, "params": tuple(group["params"])} for group in opt.param_groups]
    opt.param_groups[0]["lr"] = 1.0
    gradients(params, team, opt)
    opt.step()
    with opt.master_weights():
        assert params[0].tolist() == [3.0] * 4
        torch.testing.assert_close(params[2].detach(), torch.full((4,), 4 - 0.01))
    opt.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_that_lost_a_number_is_an_error_on_all_ranks(world, optimizer):
    params = parameters()
    opt = OPTIMIZERS[optimizer](groups_of(params), world)
    needed = set(opt.defaults) - {"foreach", "fused", "capturable", "differentiable"}
    for name in sorted(needed):
        kept = opt.param_groups[0][name]
        if world.rank == world.size - 1:
            del opt.param_groups[0][name]
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(xc.UsageError, match=f"has no '{name}'|betas must be numbers"):
            opt.step()
        opt.param_groups[0][name] = kept
    opt.step()
    opt.close()


def in_place(group):
    group["lr"].mul_(0.5)


def of_an_array(group):
    group["lr"] *= 0.5


def of_a_list(group):
    group["betas"][0] = 0.0


CHANGED = {
    "a tensor": ({"lr": lambda: torch.tensor(0.1)}, in_place),
    "an array": ({"lr": lambda: np.array(0.1)}, of_an_array),
    "a list": ({"lr": lambda: 0.1}, of_a_list),
    "a number": ({"lr": lambda: 0.1}, lambda group: group.update(lr=0.05)),
    "back and forth": ({"lr": lambda: 0.1}, lambda group: group.update(lr=0.15 - group["lr"])),
}


@pytest.mark.parametrize("how", CHANGED)
def test_numbers_that_change_in_place_are_seen(world, how):
    options, change = CHANGED[how]
    param = torch.nn.Parameter(torch.ones(4))
    theirs = torch.nn.Parameter(torch.ones(4))
    opt = xc.Adam([param], **{name: make() for name, make in options.items()}, world=world)
    other = torch.optim.Adam([theirs], **{name: make() for name, make in options.items()})
    for group in (opt.param_groups[0], other.param_groups[0]):
        group["betas"] = [0.9, 0.99]
    for step in range(6):
        for p, o in ((param, opt), (theirs, other)):
            p.grad = torch.full((4,), 1.0 + step)
            o.step()
            if step % 2:
                change(o.param_groups[0])
    torch.testing.assert_close(param, theirs)
    opt.close()


def test_a_function_for_the_inner_rate_is_asked_at_every_step(world):
    now = {"rate": 0.0}
    param = torch.nn.Parameter(torch.zeros(4))
    opt = xc.ExtrapSGD([param], lr=1.0, inner_lr=lambda lr: now["rate"], world=world)
    for rate in (0.5, 0.0, 0.25):
        now["rate"] = rate
        param.grad = torch.ones(4)
        opt.step()
        torch.testing.assert_close(param.detach(), opt.master(0) - rate)
    opt.close()


@pytest.mark.parametrize(
    "lr", [np.float16(0.1), torch.tensor(0.1, dtype=torch.bfloat16), np.float32(0.1)], ids=str
)
def test_a_number_of_another_type_is_another_number(world, lr):
    results = []
    for optimizer in (torch.optim.SGD, xc.SGD):
        param = torch.nn.Parameter(torch.zeros(1))
        opt = optimizer([param], lr=0.1, **({} if optimizer is torch.optim.SGD else {"world": world}))
        for rate in (0.1, lr):
            opt.param_groups[0]["lr"] = rate
            param.grad = torch.ones(1)
            opt.step()
        results.append(param.item())
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_a_mistake_that_was_mended_leaves_no_difference_between_ranks(world):
    param = torch.nn.Parameter(torch.zeros(1))
    opt = xc.SGD([param], lr=0.1, world=world)
    param.grad = torch.ones(1)
    opt.step()
    opt.param_groups[0]["lr"] = torch.tensor(0.1)
    opt.step()
    if world.rank == world.size - 1:
        opt.param_groups[0]["weight_decay"] = float("nan")
    with pytest.raises(xc.UsageError, match="finite"):
        opt.step()
    opt.param_groups[0]["weight_decay"] = 0
    opt.step()
    opt.close()


def test_a_key_that_is_no_number_of_the_rule_is_nothing(world):
    results = []
    for optimizer in (torch.optim.Adam, xc.Adam):
        param = torch.nn.Parameter(torch.zeros(1))
        opt = optimizer([param], lr=0.1, **({} if optimizer is torch.optim.Adam else {"world": world}))
        for step in range(3):
            param.grad = torch.tensor([1.0, -3.0, 2.0][step : step + 1])
            opt.step()
            opt.param_groups[0] |= {"beta1": 0.1, "lr": 0.11}
        results.append(param.item())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
