"""Optimizers work in `torch.inference_mode()` and `torch.no_grad()`, and train as before after them."""

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
MANNERS = ["copy", "hook", "view"]


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def backward(opt, model, world):
    for v in range(world.workers):
        with opt.worker(v):
            torch.manual_seed(7 * (v + world.workers * world.rank))
            model(torch.randn(5, 3)).square().sum().backward()


def assert_ordinary(tensors):
    assert not [tensor for tensor in tensors if tensor.is_inference()]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("gradients", MANNERS)
@pytest.mark.parametrize("kind", ["SGD", "ExtrapSGD", "Adam", "LAMB"])
def test_what_is_constructed_there_trains_as_elsewhere(team, mode, kind, gradients):
    model, plain = net(), net()
    extra, plain_extra = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    options = {"lr": 0.1, "world": team, "gradients": gradients}
    with mode():
        opt = getattr(xc, kind)(model.parameters(), **options)
        opt.add_param_group({"params": [extra]})
    expected = getattr(xc, kind)(plain.parameters(), **options)
    expected.add_param_group({"params": [plain_extra]})
    assert_ordinary([*model.parameters(), extra])
    for _ in range(3):
        for optimizer, network, other in ((opt, model, extra), (expected, plain, plain_extra)):
            optimizer.zero_grad()
            backward(optimizer, network, team)
            other.grad = torch.ones(3)
            optimizer.step()
    for mine, theirs in zip([*model.parameters(), extra], [*plain.parameters(), plain_extra], strict=True):
        assert torch.equal(mine, theirs)
    opt.close()
    expected.close()
    model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("gradients", MANNERS)
def test_everything_can_be_called_there(team, mode, gradients):
    model = net()
    opt = xc.ExtrapAdam(model.parameters(), lr=0.1, world=team, gradients=gradients)
    backward(opt, model, team)
    with mode():
        opt.step()
        opt.attach(model)
        saved = [opt.state_dict(), opt.local_state_dict(), opt.master(0), dict(model.state_dict())]
        assert_ordinary(tensors_in(saved))
        opt.load_state_dict(saved[0])
        opt.load_local_state_dict(saved[1])
        model.load_state_dict(saved[3])
        with opt.master_weights():
            assert torch.equal(model[0].weight, saved[2])
        opt.adopt()
        with opt.master_weights(write=True):
            model[0].bias.zero_()
        opt.zero_grad(set_to_none=False)
        opt.step()
        opt.sync_buffers(torch.nn.BatchNorm1d(2))
        opt.zero_grad()
    backward(opt, model, team)
    opt.step()
    with mode():
        opt.close()
    assert_ordinary(model.parameters())
    model(torch.ones(1, 3)).sum().backward()


def test_saved_states_go_to_torch_which_trains_on(world, mode):
    model = net()
    opt = xc.Adam(model.parameters(), lr=0.1, world=world)
    backward(opt, model, world)
    opt.step()
    with mode():
        state = opt.state_dict()
    opt.close()
    other = torch.optim.Adam(model.parameters(), lr=0.1)
    other.load_state_dict(state)
    other.step()


def test_gradients_that_were_made_there_are_taken(team):
    p = torch.nn.Parameter(torch.ones(3))
    opt = xc.SGD([p], lr=0.5, world=team)
    for v in range(team.workers):
        with opt.worker(v), torch.inference_mode():
            p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [0.5] * 3
    opt.close()


@pytest.mark.parametrize("where", ["construction", "group"])
def test_parameters_that_were_made_there_are_refused_on_all_ranks(world, where):
    with torch.inference_mode(world.rank == world.size - 1):
        p = torch.nn.Parameter(torch.ones(3))
    first = torch.nn.Parameter(torch.ones(3))
    opt = xc.SGD([first], lr=0.5, world=world)
    with pytest.raises(
        xc.UsageError, match=r"was made in torch\.inference_mode\(\) and can never be trained"
    ):
        if where == "group":
            opt.add_param_group({"params": [p]})
        else:
            xc.SGD([p], lr=0.1, world=world)
    first.grad = torch.ones(3)
    opt.step()
    assert first.tolist() == [0.5] * 3
    opt.close()


def test_foreign_write_there_is_noticed(world, mode):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    with mode():
        model[0].weight.mul_(2)
    backward(opt, model, world)
    with pytest.raises(xc.UsageError, match="was written or replaced outside"):
        opt.step()
    opt.close()


def test_engine_that_is_constructed_there_has_ordinary_arrays(world, mode):
    with mode():
        engine = xc.Engine(world, {"w": torch.ones(3)}, lr=0.5)
    engine.grads["w"].fill_(1.0)
    engine.step()
    assert engine.weights["w"].tolist() == [0.5] * 3
    np.testing.assert_array_equal(engine.master()["w"], [0.5] * 3)
    engine.close()
