"""Writes through .data, for which torch counts no version, are mostly noticed; the optimizer's own never are."""

import contextlib

import pytest
from conftest import DEVICE

import extrapcomm as xc

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(bool(DEVICE), reason="weights on a device are not compared")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRITTEN = "was written or replaced outside"


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    return model.to(dtype)


def gradients(model, opt, world):
    for v in range(world.workers):
        with opt.worker(v):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.01 * (world.rank + v + i + 1))


def trained(world, dtype=torch.float32, make=xc.ExtrapSGD, **hyper):
    model = net(dtype)
    opt = make(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **hyper}, world=world)
    for _ in range(2):
        gradients(model, opt, world)
        opt.step()
    return model, opt


def lookahead(model):
    slow = net()
    for p, q in zip(model.parameters(), slow.parameters(), strict=True):
        p.data.copy_(q.data + 0.5 * (p.data - q.data))


def merge_lora(model):
    torch.manual_seed(1)
    a, b = torch.randn(2, 7), torch.randn(50, 2)
    model[0].weight.data += b @ a


def through_numpy(model):
    model[2].bias.detach().numpy()[...] = 7


WRITES = {
    "clamp": lambda model: [p.data.clamp_(-1e-3, 1e-3) for p in model.parameters()],
    "lookahead": lookahead,
    "LoRA": merge_lora,
    "NumPy": through_numpy,
    "first element": lambda model: model[0].weight.data.view(-1)[0].zero_(),
    "last element": lambda model: model[2].weight.data.view(-1)[-1].zero_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_write_through_data_on_one_rank_is_an_error_on_all_until_it_is_adopted(team, write):
    model, opt = trained(team)
    gradients(model, opt, team)
    before = [opt.master(i) for i in range(4)]
    if team.rank == team.size - 1:
        WRITES[write](model)
    for _ in range(2):
        with pytest.raises(xc.UsageError, match=WRITTEN):
            opt.step()
    assert all(torch.equal(opt.master(i), w) for i, w in enumerate(before))
    opt.adopt()
    gradients(model, opt, team)
    opt.step()
    opt.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, -1])
def test_first_and_last_element_of_every_type_are_compared(team, dtype, at):
    model, opt = trained(team, dtype)
    gradients(model, opt, team)
    if team.rank == 0:
        flat = model[2].weight.data.view(-1)
        flat[at] = -flat[at]
    with pytest.raises(xc.UsageError, match=r"'0\.2' " + WRITTEN):
        opt.step()
    opt.close()


def test_write_into_another_worker_is_an_error_at_the_next_step(worlds):
    world = worlds(2)
    for write in (lambda p: p.data.clamp_(-1e-3, 1e-3), lambda p: p.detach().mul_(2)):
        model, opt = trained(world)
        gradients(model, opt, world)
        with opt.worker(1):
            if world.rank == world.size - 1:
                write(model[0].weight)
        with pytest.raises(xc.UsageError, match=r"'0\.0' of worker 1 " + WRITTEN):
            opt.step()
        with opt.worker(0):
            pass
        opt.adopt()
        gradients(model, opt, world)
        opt.step()
        opt.close()


def test_write_before_entering_another_worker_is_an_error_on_all_ranks(worlds):
    world = worlds(2)
    model, opt = trained(world)
    if world.rank == world.size - 1:
        model[0].weight.data.clamp_(-1e-3, 1e-3)
        with pytest.raises(xc.UsageError, match=WRITTEN), opt.worker(1):
            pass
    else:
        with pytest.raises(xc.UsageError, match=WRITTEN):
            opt.step()
    opt.adopt()
    opt.close()


def test_exception_inside_worker_comes_out_beside_a_write(worlds):
    world = worlds(2)
    model, opt = trained(world)
    with pytest.raises(KeyError), opt.worker(1):
        model[0].weight.data.clamp_(-1e-3, 1e-3)
        raise KeyError
    with pytest.raises(xc.UsageError, match=WRITTEN):
        opt.step()
    opt.close()


@pytest.mark.parametrize("extrapolation", ["none", "local", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_writes_are_no_false_alarm(team, dtype, extrapolation):
    model = net(dtype)
    opt = xc.ExtrapSGD(
        model.parameters(), lr=0.1, momentum=0.9, skip_nonfinite=True, world=team, extrapolation=extrapolation
    )
    opt.attach(model)

    def step():
        gradients(model, opt, team)
        opt.step()

    for _ in range(5):
        step()
    model[0].weight.grad.fill_(float("nan"))
    opt.step()
    assert opt.skipped
    step()
    with opt.master_weights():
        model(torch.ones(2, 7, dtype=dtype))
    step()
    with opt.master_weights(write=True), torch.no_grad():
        model[0].weight.mul_(0.5)
    step()
    with opt.kept_weights():
        model[0].weight.data.zero_()
    step()
    model.load_state_dict(model.state_dict())
    for v in range(team.workers):
        with opt.worker(v), opt.master_weights():
            pass
    step()
    with torch.no_grad():
        model[0].weight.zero_()
    opt.adopt()
    step()
    saved = opt.state_dict()
    step()
    opt.load_state_dict(saved)
    step()
    opt.load_local_state_dict(opt.local_state_dict())
    step()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(5, dtype=dtype))]})
    step()
    opt.close()


def test_local_steps_and_averages_are_no_false_alarm(team):
    model = net()
    opt = xc.PostLocalSGD(
        model.parameters(), lr=0.1, momentum=0.9, local_steps=3, start=2, world=team, extrapolation="local"
    )
    for step in range(12):
        gradients(model, opt, team)
        opt.step()
        if step == 7:
            opt.average()
        if step == 9:
            opt.adopt()
    with opt.master_weights(), opt.no_sync():
        pass
    if team.rank == 0:
        model[0].weight.data.zero_()
    for _ in range(3):  # on the ranks that wrote nothing, local steps go on until the average
        try:
            gradients(model, opt, team)
            opt.step()
        except xc.UsageError as error:
            assert "was written or replaced" in str(error)
            break
    else:
        pytest.fail("the write was not noticed")
    opt.close()


def test_interrupted_loading_leaves_no_false_alarm(team):
    model, opt = trained(team)
    opt.attach(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), "odd": torch.zeros(1)})
    gradients(model, opt, team)
    opt.step()
    opt.close()


def test_weights_without_elements_are_compared_by_nobody(team):
    empty, scalar = torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.tensor(2.0))
    opt = xc.SGD([empty, scalar], lr=0.5, world=team)
    for v in range(team.workers):
        with opt.worker(v):
            scalar.grad = torch.tensor(1.0)
    opt.step()
    assert scalar == 1.5
    scalar.data.fill_(7)
    with pytest.raises(xc.UsageError, match=r"'0\.1' " + WRITTEN):
        opt.step()
    opt.close()


@pytest.mark.parametrize("look", ["master_weights", "kept_weights", "add_param_group", "load"])
def test_contexts_and_new_groups_do_not_hide_a_write(team, look):
    """They used to record the written weights as the optimizer's own, and the write was lost."""
    model, opt = trained(team)
    state = opt.state_dict()
    del state["extrapcomm"]  # so that the weights there are stay
    with torch.no_grad():
        model[0].weight.mul_(2)
    calls = {
        "master_weights": lambda: opt.master_weights().__enter__(),
        "kept_weights": lambda: opt.kept_weights().__enter__(),
        "add_param_group": lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
        "load": lambda: opt.load_state_dict(state),
    }
    for call in (calls[look], opt.step):
        with pytest.raises(xc.UsageError, match=r"'0\.0' " + WRITTEN):
            call()
    opt.adopt()
    gradients(model, opt, team)
    opt.step()
    opt.close()


TURNED = {
    "data": lambda p: setattr(p, "data", p.data.t()),
    "in place": lambda p: torch.no_grad()(p.t_)(),
    "another memory format": lambda p: setattr(p, "data", p.data.as_strided((4, 4), (1, 4))),
}


@pytest.mark.parametrize("how", TURNED)
@pytest.mark.parametrize("mode", ["copy", "hook", "view"])
def test_parameter_that_looks_at_its_memory_by_other_strides_is_refused_and_can_be_adopted(team, mode, how):
    start = torch.arange(16.0).reshape(4, 4)
    param = torch.nn.Parameter(start.clone())
    opt = xc.SGD([param], lr=1.0, gradients=mode, world=team)
    TURNED[how](param)
    with pytest.raises(xc.UsageError, match="written or replaced"):
        opt.step()
    opt.adopt()
    assert torch.equal(param, start.t()) and param.is_contiguous()
    weights = torch.arange(16.0).reshape(4, 4)
    for v in range(team.workers):
        with opt.worker(v):
            (param * weights).sum().backward()
    opt.step()
    torch.testing.assert_close(param.detach(), start.t() - weights)
    opt.close()


def test_workers_and_master_weights_within_one_autocast_region_have_their_own_casts(virtual):
    """Autocast keeps the casts of parameters by the tensor, whatever memory it has now."""
    world = virtual(2)
    results = []
    for one_region in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        opt = xc.ExtrapSGD(model.parameters(), lr=0.5, inner_lr=0.5, world=world)
        for step in range(3):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=one_region):
                for v in range(2):
                    with opt.worker(v), torch.autocast("cpu", torch.bfloat16):
                        model(torch.full((1, 3), float(v + step + 1))).square().sum().backward()
                with opt.master_weights(), torch.autocast("cpu", torch.bfloat16):
                    results.append(model(torch.ones(1, 3)).detach().clone())
            opt.step()
        results.append(opt.master(0))
        opt.close()
    for one, other in zip(results[:4], results[4:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [1, 4])
def test_parameter_that_looks_at_a_part_of_its_memory_is_refused_also_by_adopt(team, rows):
    param = torch.nn.Parameter(torch.ones(6, 2))
    opt = xc.SGD([param], lr=1.0, world=team)
    param.data = param.data[:rows]
    with pytest.raises(xc.UsageError, match="written or replaced"):
        opt.step()
    with pytest.raises(xc.UsageError, match="another shape"):
        opt.adopt()
    opt.close()


REPLACED = {
    "in place": lambda model: model[0].weight.mul_(2),
    "through .data": lambda model: model[0].weight.data.mul_(2),
    "replaced data": lambda model: setattr(model[0].weight, "data", torch.ones(50, 7)),
    "loaded": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
}


@pytest.mark.parametrize("pending", [False, True], ids=["", "loaded before"])
@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_writes_inside_master_weights_are_an_error_and_restored(world, how, extrapolation, pending):
    model, opt = trained(world, extrapolation=extrapolation)
    opt.attach(model)
    if pending:
        model.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    with (
        pytest.raises(xc.UsageError, match=r"'0\.0' was written or replaced inside master_weights"),
        opt.master_weights(),
        torch.no_grad(),
    ):
        REPLACED[how](model)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    if pending and how == "replaced data":
        return
    gradients(model, opt, world)
    opt.step()
    opt.close()


def test_weights_that_were_put_back_inside_master_weights_are_no_error(world):
    model, opt = trained(world)
    with opt.master_weights(), torch.no_grad():
        kept = [p.clone() for p in model.parameters()]
        for p in model.parameters():
            p.zero_()
        for p, was in zip(model.parameters(), kept, strict=True):
            p.copy_(was)
    gradients(model, opt, world)
    opt.step()
    opt.close()


def test_an_error_inside_master_weights_is_not_hidden_by_what_was_written(world):
    model, opt = trained(world)
    with pytest.raises(ZeroDivisionError), opt.master_weights():
        model[0].weight.data.zero_()
        raise ZeroDivisionError
    gradients(model, opt, world)
    opt.step()
    opt.close()


def test_parameters_that_share_a_counter_of_writes_are_no_false_alarm(world):
    first = torch.ones(4, requires_grad=True)
    second = first.detach().requires_grad_()
    second.data = torch.zeros(4)
    opt = xc.ExtrapSGD([first, second], lr=0.1, world=world)
    assert first._version == second._version
    for _ in range(3):
        first.grad, second.grad = torch.ones(4), torch.ones(4)
        opt.step()
    with torch.no_grad():
        second.mul_(2)
    with pytest.raises(xc.UsageError, match=WRITTEN):
        opt.step()
    opt.close()


def test_a_model_that_ran_before_its_optimizer_was_made_can_go_backward(world):
    model = net()
    loss = model(torch.ones(1, 7)).sum()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    loss.backward()
    opt.step()
    opt.close()


def as_float64_and_back(model):
    model.double()
    model.float()


MOVED = {
    "half": (lambda model: model.half(), True),
    "double": (lambda model: model.double(), True),
    "double and back": (as_float64_and_back, False),
    "clone": (lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()), False),
    "shared": (lambda model: model.share_memory(), False),
    "transposed": (lambda model: setattr(model[1].weight, "data", model[1].weight.data.t()), True),
}


@pytest.mark.parametrize("fails", [False, True], ids=["", "and an exception"])
@pytest.mark.parametrize("how", MOVED)
def test_parameters_that_were_moved_inside_master_weights_are_put_back(world, how, fails):
    move, refused = MOVED[how]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 5))
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.1, world=world)
    gradients(model, opt, world)
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    expected = pytest.raises(ZeroDivisionError if fails else xc.UsageError)
    with expected if fails or refused else contextlib.nullcontext(), opt.master_weights():
        move(model)
        if fails:
            raise ZeroDivisionError
    for p, was in zip(model.parameters(), before, strict=True):
        assert p.dtype == was.dtype and p.stride() == was.stride() and torch.equal(p, was)
    gradients(model, opt, world)
    opt.step()
    opt.close()
