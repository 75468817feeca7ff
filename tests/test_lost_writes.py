"""Writes into weights between steps are kept, saved or errors; they never vanish."""

import cProfile

import numpy as np
import pytest
from conftest import TEAM

import extrapcomm as xc

torch = pytest.importorskip("torch")


@pytest.fixture(params=[1, 2], ids=lambda workers: f"V={workers}")
def world(request, worlds):
    """All ranks, with one worker or two each."""
    return worlds(request.param)


WRITES = {
    "counted": lambda p: p.detach().fill_(7.0),
    "through data": lambda p: p.data.fill_(7.0),
    "replaced": lambda p: setattr(p, "data", torch.full_like(p, 7.0)),
}


def small(world, attach=True, **more):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    opt = xc.SGD(model.parameters(), lr=0.1, momentum=0.9, world=world, **more)
    if attach:
        opt.attach(model)
    return model, opt


def step(model, opt):
    opt.zero_grad()
    for v in range(opt.world.workers):
        with opt.worker(v):
            model(torch.ones(1, 2)).sum().backward()
    opt.step()


def ones(module):
    return {key: torch.ones_like(value) for key, value in module.state_dict().items()}


# -- No step follows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extrapolation", ["none", "local"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_before_close_stays_and_is_saved(world, write, extrapolation):
    model, opt = small(world, extrapolation=extrapolation)
    step(model, opt)
    others = opt.master(1)
    write(model[0].weight)
    assert model.state_dict()["0.weight"].eq(7).all()
    assert torch.equal(model.state_dict()["0.bias"], others)
    opt.close()
    assert model[0].weight.eq(7).all()
    torch.testing.assert_close(model[0].bias.detach(), others)


@pytest.mark.parametrize("attach", [False, True])
def test_weights_that_are_loaded_last_stay(world, attach):
    model, opt = small(world, attach)
    step(model, opt)
    model.load_state_dict(ones(model))
    opt.close()
    assert all(p.eq(1).all() for p in model.parameters())


def test_a_saved_optimizer_tells_of_writes_that_it_lacks(world, caplog):
    model, opt = small(world)
    step(model, opt)
    with opt.collected_state():
        opt.state_dict()
        assert not caplog.records
        model[0].weight.data.fill_(7.0)
        opt.state_dict()
        assert "was written" in caplog.text and "adopt" in caplog.text
        caplog.clear()
    opt.adopt()
    opt.state_dict()
    assert not caplog.records
    opt.close()


# -- The model loads something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [w for name, w in WRITES.items() if name != "replaced"])
def test_a_write_on_one_rank_before_another_part_is_loaded_is_noticed(world, write):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model, opt = small(world)
    step(model, opt)
    if world.rank == world.size - 1:
        write(model[0].weight)
    model[1].load_state_dict(ones(model[1]))
    with pytest.raises(xc.MismatchError, match="not loaded"):
        opt.step()
    opt.adopt()
    step(model, opt)
    opt.close()


def test_a_write_on_one_rank_that_is_loaded_over_is_none(world):
    model, opt = small(world)
    if world.rank == 0:
        model[1].weight.detach().fill_(7.0)
    model[1].load_state_dict(ones(model[1]))
    opt.step()
    assert model[1].weight.eq(1).all()
    opt.close()


@pytest.mark.parametrize("loaded", [0, 1])
def test_a_write_in_another_worker_before_a_load_is_noticed(world, loaded):
    if world.workers == 1:
        pytest.skip("needs two workers")
    model, opt = small(world)
    with opt.worker(1):
        model[0].weight.detach().fill_(7.0)
    model[loaded].load_state_dict(ones(model[loaded]))
    if loaded == 1:
        with pytest.raises(xc.UsageError, match="worker 1"):
            opt.step()
        opt.adopt()
    opt.step()
    opt.close()


def write_then_load_a_part(model, opt, copies):
    copies["0.weight"].fill_(5.0)
    model[1].load_state_dict(ones(model[1]))


def write_then_load_the_others(model, opt, copies):
    copies["0.weight"].fill_(5.0)
    model.load_state_dict({k: v for k, v in copies.items() if k != "0.weight"}, strict=False)


def load_then_write(model, opt, copies):
    model.load_state_dict(copies)
    copies["0.weight"].fill_(5.0)


@pytest.mark.parametrize("way", [write_then_load_a_part, write_then_load_the_others, load_then_write])
def test_writes_into_a_state_dict_are_noticed_after_other_changes(world, way):
    model, opt = small(world)
    copies = model.state_dict()
    way(model, opt, copies)
    with pytest.raises(xc.UsageError, match=r"0\.weight.*was written"):
        opt.step()
    del copies
    opt.step()
    opt.close()


def test_a_state_dict_that_is_changed_and_loaded_counts(world):
    model, opt = small(world)
    copies = model.state_dict()
    copies["0.weight"].fill_(5.0)
    model.load_state_dict(copies)
    opt.step()
    assert model[0].weight.eq(5).all()
    opt.close()


def test_a_state_dict_that_is_changed_and_loaded_counts_in_the_local_phase(world):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    opt = xc.PostLocalSGD(model.parameters(), lr=0.1, local_steps=4, start=1, world=world)
    opt.attach(model)
    for _ in range(3):
        step(model, opt)
    copies = model.state_dict()
    for copy in copies.values():
        copy.fill_(5.0)
    model.load_state_dict(copies)
    step(model, opt)
    assert all((p - 5).abs().max() < 5 for p in model.parameters())
    opt.close()


def test_assigned_parameters_are_refused(world):
    model, opt = small(world)
    with pytest.raises(xc.UsageError, match="assign=True"):
        model.load_state_dict(ones(model), assign=True)
    step(model, opt)
    opt.close()


# -- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(TEAM), reason="opt.state is read inside one team, or collected")
def test_copies_of_state_are_watched_while_other_state_is_staged(world):
    model, opt = small(world)
    step(model, opt)
    copy = opt.state[model[0].bias]["momentum_buffer"]
    opt.state[model[0].weight]["momentum_buffer"] = torch.zeros(3, 2)
    step(model, opt)
    copy.fill_(5.0)
    with pytest.raises(xc.UsageError, match="written in place"):
        step(model, opt)
    opt.close()


@pytest.mark.skipif(bool(TEAM), reason="opt.state is read inside one team, or collected")
@pytest.mark.parametrize("how", ["value", "entry", "deleted", "cleared"])
def test_copies_of_state_that_was_replaced_may_be_written(world, how):
    model, opt = small(world)
    step(model, opt)
    weight = model[0].weight
    copy = opt.state[weight]["momentum_buffer"]
    if how == "value":
        opt.state[weight]["momentum_buffer"] = torch.zeros(3, 2)
    elif how == "entry":
        opt.state[weight] = {"momentum_buffer": torch.zeros(3, 2)}
    elif how == "deleted":
        del opt.state[weight]
    else:
        opt.state.clear()
    copy.mul_(3)
    step(model, opt)
    opt.close()


# -- Other memory ----------------------------------------------------------------------------------------------------


def exchange(params):
    params[0].data, params[1].data = params[1].data, params[0].data
    return [1, 0, 2, 3]


def shift(params):
    for i in (3, 2, 1):
        params[i].data = params[i - 1].data
    return [0, 0, 1, 2]


@pytest.mark.parametrize("how", ["adopt", "master_weights"])
@pytest.mark.parametrize("move", [exchange, shift])
def test_parameters_that_look_at_each_other_are_adopted_with_what_they_show(world, move, how):
    params = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(4)]
    opt = xc.SGD(params, lr=0.1, world=world)
    if how == "adopt":
        expected = move(params)
        opt.adopt()
    else:
        with opt.master_weights(write=True):
            expected = move(params)
    assert [p[0].item() for p in params] == expected
    assert [opt.master(i)[0].item() for i in range(4)] == expected
    opt.close()


@pytest.mark.parametrize("move", [exchange, shift])
@pytest.mark.parametrize("pending", [False, True])
def test_kept_weights_come_back_to_their_own_memory(world, move, pending):
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.full((3,), float(i))) for i in range(4)])
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    if pending:
        model.load_state_dict(model.state_dict())
    with opt.kept_weights():
        move(list(model))
    assert [p[0].item() for p in model] == [0, 1, 2, 3]
    opt.step()
    assert [p[0].item() for p in model] == [0, 1, 2, 3]
    opt.close()


def conv(world=None, kind=xc.SGD):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 2, 3)
    more = {"world": world} if kind is xc.SGD else {}
    return model, kind(model.parameters(), lr=0.1, momentum=0.9, **more)


LAYOUTS = {
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "flat": lambda model: setattr(model.weight, "data", model.weight.data.view(-1)),
    "empty": lambda model: setattr(model.weight, "data", torch.empty(0)),
    "transposed": lambda model: setattr(model.weight, "data", model.weight.data.transpose(2, 3)),
}


def train_conv(model, opt, images):
    opt.zero_grad()
    for v in range(opt.world.workers if isinstance(opt, xc.SGD) else 1):
        if isinstance(opt, xc.SGD):
            with opt.worker(v):
                model(images).pow(2).mean().backward()
        else:
            model(images).pow(2).mean().backward()
    opt.step()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_saved_does_not_depend_on_the_parameters_present_layout(world, layout):
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    model, opt = conv(world)
    train_conv(model, opt, images)
    weights = model.weight.detach().clone()
    momentum = opt.state_dict()["state"][0]["momentum_buffer"]
    layout(model)
    with opt.collected_state():
        saved = opt.state_dict()
        assert torch.equal(opt.master(0), weights)
    assert torch.equal(saved["extrapcomm"]["master"][0], weights)
    assert torch.equal(saved["state"][0]["momentum_buffer"], momentum)
    opt.close()
    assert torch.equal(opt.master(0), weights)


@pytest.mark.parametrize("attach", [False, True])
def test_a_checkpoint_is_loaded_into_another_layout(world, attach):
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    theirs, torchs = conv(kind=torch.optim.SGD)
    train_conv(theirs, torchs, images)
    model, opt = conv(world)
    train_conv(model, opt, images)
    saved = {key: value.clone() for key, value in model.state_dict().items()}, opt.state_dict()
    other, again = conv(world)
    if attach:
        again.attach(other)
    other.to(memory_format=torch.channels_last)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train_conv(other, again, images)
    train_conv(theirs, torchs, images)
    np.testing.assert_allclose(
        other.weight.detach().numpy(), theirs.weight.detach().numpy(), rtol=1e-4, atol=1e-6
    )
    opt.close()
    again.close()


# -- Micro-batches that are dropped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_a_micro_batch_that_is_dropped_within_no_sync_does_not_count(world, again):
    param = torch.nn.Parameter(torch.zeros(3))
    opt = xc.SGD([param], lr=1.0, world=world)
    for v in range(world.workers):
        with opt.worker(v):
            with opt.no_sync():
                (param * 5).sum().backward()
                opt.zero_grad() if world.workers == 1 else setattr(param, "grad", None)
                if again:
                    (param * 3).sum().backward()
            param.sum().backward()
    if world.workers == 1:
        opt.step()
        assert param.detach().tolist() == [-2.0 if again else -1.0] * 3
    opt.close()


# -- What a reading of these rules has shown ---------------------------------------------------------------------------


def two_parts(world, **more):
    """A model and a criterion, each attached."""
    torch.manual_seed(0)
    model, criterion = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    opt = xc.SGD([*model.parameters(), *criterion.parameters()], lr=0.01, world=world, **more)
    opt.attach(model)
    opt.attach(criterion)
    both = torch.nn.Sequential(model, criterion)
    step(both, opt)
    return both, opt


@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_a_part_is_loaded_with_several_workers(world, extrapolation):
    model, opt = two_parts(world, extrapolation=extrapolation)
    model[0].load_state_dict(ones(model[0]))
    step(model, opt)
    step(model, opt)
    opt.close()


@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_a_write_in_another_worker_is_remembered_while_that_worker_trains_on(world, extrapolation):
    if world.workers == 1:
        pytest.skip("needs two workers")
    model, opt = two_parts(world, extrapolation=extrapolation)
    with opt.worker(1):
        model[1].weight.detach().add_(1.0)
    model[0].load_state_dict(ones(model[0]))
    with pytest.raises(xc.UsageError, match="worker 1"):
        step(model, opt)
    opt.adopt()
    step(model, opt)
    opt.close()


def load_state(opt, saved):
    opt.load_state_dict(saved)
    opt.step()


def load_state_of_torch(opt, saved):
    load_state(opt, {key: value for key, value in saved.items() if key != "extrapcomm"})


def commit(opt, _):
    with opt.master_weights(write=True):
        pass


def add_group(opt, _):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("then", [load_state, load_state_of_torch, commit, add_group])
def test_a_write_on_one_rank_is_noticed_by_whatever_adopts(world, then):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model, opt = two_parts(world)
    saved = opt.state_dict()
    if world.rank == world.size - 1:
        model[1].weight.detach().add_(1.0)
    model[0].load_state_dict(ones(model[0]))
    with pytest.raises(xc.MismatchError, match="not loaded"):
        then(opt, saved)
    opt.close()


def test_bits_that_were_put_back_before_a_part_is_loaded_are_no_write(world):
    model, opt = two_parts(world)
    if world.rank == 0:
        kept = model[1].weight.detach().clone()
        model[1].weight.detach().mul_(0.5)
        model[1].weight.detach().copy_(kept)
    model[0].load_state_dict(ones(model[0]))
    step(model, opt)
    opt.close()


@pytest.mark.parametrize("how", ["load", "copy"])
def test_an_average_in_a_state_dict_may_be_taken_in_master_weights(world, how):
    model, opt = small(world)
    average = model.state_dict()
    for value in average.values():
        value.mul_(0.5)
    with opt.master_weights(write=True):
        if how == "load":
            model.load_state_dict(average)
        else:
            for param, value in zip(model.parameters(), average.values(), strict=True):
                param.data.copy_(value)
    step(model, opt)
    opt.close()


@pytest.mark.parametrize("context", ["master_weights", "write", "kept_weights"])
def test_assigned_parameters_are_refused_inside_contexts(world, context):
    model, opt = small(world)
    contexts = {"write": lambda: opt.master_weights(write=True)}
    with (
        pytest.raises(xc.UsageError, match="assign=True"),
        contexts.get(context, getattr(opt, context, None))(),
    ):
        model.load_state_dict(ones(model), assign=True)
    step(model, opt)
    opt.close()


def test_weights_that_were_put_back_are_saved_as_master_weights_with_a_warning(world, caplog):
    model, opt = small(world, extrapolation="local", inner_lr=0.1)
    step(model, opt)
    weight, wanted = model[0].weight, opt.master(0)
    shown = weight.detach().clone()
    weight.detach().mul_(0.9)
    weight.detach().copy_(shown)
    assert torch.equal(model.state_dict()["0.weight"], wanted)
    assert "may have the values from before" in caplog.text
    opt.close()
    assert torch.equal(weight.detach(), wanted)


def test_a_turned_parameter_that_is_written_stays_when_the_optimizer_is_closed(world):
    param = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    opt = xc.SGD([param], lr=0.1, world=world)
    param.data = param.data.t()
    param.detach().mul_(2)
    wanted = param.detach().clone()
    opt.close()
    assert torch.equal(param.detach(), wanted)


def test_older_copies_of_a_state_dict_are_watched(world):
    model, opt = small(world)
    first, second = model.state_dict(), model.state_dict()
    del second
    step(model, opt)
    first["0.weight"].mul_(2)
    with pytest.raises(xc.UsageError, match="was written"):
        step(model, opt)
    opt.close()


def test_many_modules_load_in_time_that_grows_with_their_number(world):
    """Calls of this library's functions are counted, which load does not change."""
    if world.size > 1:
        pytest.skip("one process is enough")
    calls = []
    for count in (50, 100):
        model = torch.nn.Sequential(*[torch.nn.LayerNorm(2) for _ in range(count)])
        opt = xc.SGD(model.parameters(), lr=0.1, world=world)
        opt.attach(model)
        state = model.state_dict()
        profile = cProfile.Profile()
        profile.runcall(model.load_state_dict, state)
        ours = [e for e in profile.getstats() if "extrapcomm" in getattr(e.code, "co_filename", "")]
        calls.append(sum(entry.callcount for entry in ours))
        opt.close()
    assert calls[1] < 2.5 * calls[0]
