"""A second optimizer on the same parameters takes them; the first then neither writes nor disturbs them."""

import gc
import itertools

import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

MODES = ("copy", "hook", "view")


def parameters():
    return [torch.nn.Parameter(torch.full((n,), 2.0)) for n in (4, 0, 3)]


def make(params, world, mode="copy", kind=xc.SGD):
    return kind(params, lr=0.5, world=world, gradients=mode)


def train(params, opt, world):
    opt.zero_grad()
    for v in range(world.workers):
        with opt.worker(v):
            sum(p.sum() for p in params).backward()
    opt.step()


def assert_all(params, value):
    for p in params:
        assert (p == value).all(), p


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["close", "drop", "stay"])
def test_second_optimizer_trains_on_whatever_becomes_of_the_first(team, mode, end):
    params = parameters()
    first = make(params, team, mode)
    train(params, first, team)
    second = make(params, team, mode)
    train(params, second, team)
    if end == "close":
        first.close()
        first.close()
    if end == "drop":
        team.comm.Barrier()
        del first
        gc.collect()
    assert_all(params, 1.0)
    for value in (0.5, 0.0):
        train(params, second, team)
        assert_all(params, value)
    with second.master_weights():
        assert_all(params, 0.0)
    second.close()
    assert_all(params, 0.0)
    if end == "stay":
        first.close()
        assert_all(params, 0.0)


def test_graph_of_the_second_survives_the_closing_of_the_first(world):
    """Closing counts no version of tensors that it does not write."""
    p = torch.nn.Parameter(torch.ones(4))
    first = make([p], world)
    second = make([p], world)
    loss = p.square().sum()
    first.close()
    loss.backward()
    second.step()
    second.close()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_optimizers_are_closed_in_any_order(team, order):
    params = parameters()
    opts = [make(params, team, kind=kind) for kind in (xc.SGD, xc.ExtrapSGD, xc.SGD)]
    train(params, opts[-1], team)
    assert_all(params, 1.5)
    for i in order:
        opts[i].close()
        assert_all(params, 1.5)


def test_first_closed_inside_worker_leaves_the_second_its_weights(worlds):
    world = worlds(2)
    params = parameters()
    first = make(params, world)
    with first.worker(1):
        second = make(params, world)
        first.close()
    train(params, second, world)
    assert_all(params, 1.5)
    second.close()


def test_first_takes_part_in_nothing_until_it_adopts(team):
    params = parameters()
    first = make(params, team)
    train(params, first, team)
    second = make(params, team)
    train(params, second, team)
    calls = [
        first.step,
        lambda: first.master_weights().__enter__(),
        lambda: first.master_weights(write=True).__enter__(),
        lambda: first.kept_weights().__enter__(),
        lambda: first.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
    ]
    if team.workers > 1:
        calls.append(lambda: first.worker(1).__enter__())
    for call in calls:
        with pytest.raises(xc.UsageError, match="was written or replaced outside"):
            call()
    train(params, second, team)
    assert_all(params, 0.5)
    first.adopt()
    train(params, first, team)
    assert_all(params, 0.0)
    with pytest.raises(xc.UsageError, match="was written or replaced outside"):
        second.step()
    second.close()
    assert_all(params, 0.0)
    first.close()


def test_first_with_loaded_weights_leaves_the_second_alone(team):
    model = torch.nn.Linear(2, 2)
    first = make(model.parameters(), team)
    first.attach(model)
    model.load_state_dict({name: torch.full_like(t, 2.0) for name, t in model.state_dict().items()})
    second = make(model.parameters(), team)
    train(list(model.parameters()), second, team)
    first.close()
    train(list(model.parameters()), second, team)
    assert_all(model.parameters(), 1.0)
    second.close()


def test_new_group_of_the_second_holds_what_the_first_trained(team):
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    first, second = make([a], team), make([b], team)
    train([a], first, team)
    second.add_param_group({"params": [a]})
    first.close()
    train([a, b], second, team)
    assert a.tolist() == [0.0] * 3 and b.tolist() == [0.5] * 3
    second.close()


def test_saving_hook_of_an_optimizer_whose_parameters_were_taken_is_silent(team):
    model = torch.nn.Linear(3, 2)
    first = xc.SGD(model.parameters(), lr=0.5, world=team)
    first.attach(model)
    second = xc.SGD(model.parameters(), lr=0.5, world=team)
    for v in range(team.workers):
        with second.worker(v):
            model(torch.ones(1, 3)).sum().backward()
    second.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    second.close()
    first.close()


def test_lazy_parameters_are_refused_with_the_remedy(world):
    with pytest.raises(xc.UsageError, match="run the model once"):
        xc.SGD(torch.nn.LazyLinear(3).parameters(), lr=0.1, world=world)


def test_loading_a_model_takes_nothing_back_from_the_newer_optimizer(world):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    older = xc.SGD(model.parameters(), lr=0.1, world=world)
    older.attach(model)
    newer = xc.SGD(model[1].parameters(), lr=1.0, world=world)
    newer.attach(model)
    model.load_state_dict({name: torch.full_like(value, 2.0) for name, value in model.state_dict().items()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    newer.step()
    with pytest.raises(xc.UsageError, match="written or replaced"):
        older.step()
    newer.step()
    assert (model[1].bias == 0).all() and (model[0].bias == 2).all()
    older.adopt()
    older.step()
    newer.close()
    older.close()
