"""Who owns the weights: what others write is noticed, adopted, saved and loaded; nothing is lost silently."""

import copy
import gc
import io
import os
import pickle

import numpy as np
import pytest
from conftest import COMM

import extrapcomm as xc

torch = pytest.importorskip("torch")

MOMENTUM = {"lr": 0.1, "momentum": 0.9}
KINDS = {
    "SGD": (xc.SGD, torch.optim.SGD, {**MOMENTUM, "nesterov": True, "weight_decay": 1e-3}),
    "ExtrapSGD": (xc.ExtrapSGD, torch.optim.SGD, {**MOMENTUM, "dampening": 0.1}),
    "plain SGD": (xc.SGD, torch.optim.SGD, {"lr": 0.1}),
    "Adam": (xc.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 1e-2}),
    "AdamW": (xc.AdamW, torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    return model.to(dtype)


def train(model, opt, world, steps=3, start=0):
    """Steps on samples that every rank's worker 0 sees alike, so that K does not matter without extrapolation."""
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        x = torch.randn(11, 7).to(next(model.parameters()).dtype)
        opt.zero_grad()
        for v in range(world.workers if isinstance(opt, xc.SGD | xc.Adam) else 1):
            with opt.worker(v) if hasattr(opt, "worker") else contextless():
                model(x).square().sum().mul(0.1).backward()
        opt.step()


class contextless:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def master_values(model, opt):
    with opt.master_weights():
        return values(model)


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


WRITES = {
    "in place": lambda p: p.mul_(2),
    "copy": lambda p: p.copy_(torch.zeros_like(p)),
    "new data": lambda p: setattr(p, "data", torch.zeros_like(p)),
}


@pytest.mark.parametrize("write", WRITES)
def test_foreign_write_on_one_rank_is_an_error_on_all_and_adopting_takes_it(world, write):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=world)
    train(model, opt, world)
    before = [opt.master(i) for i in range(4)]
    with torch.no_grad():
        if world.rank == world.size - 1:
            WRITES[write](model[2].weight)
    with pytest.raises(xc.UsageError, match=r"'0\.2' was written or replaced outside"):
        opt.step()
    assert_equal([opt.master(i) for i in range(4)], before)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    opt.adopt()
    assert all((m == 0.5).all() for m in master_values(model, opt))
    assert all((p == 0.5).all() for p in model.parameters())
    train(model, opt, world)
    opt.close()


def test_own_writes_are_no_false_alarm(team):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=team)
    average = torch.optim.swa_utils.AveragedModel(model)
    for round_ in range(3):
        train(model, opt, team, start=round_)
        with opt.master_weights():
            average.update_parameters(model)
            model.eval()
            model(torch.zeros(1, 7))
            model.train()
        for p in model.parameters():
            p.requires_grad_(round_ % 2 == 0)
            p.requires_grad_(True)
        torch.nn.utils.parameters_to_vector(model.parameters())
        copy.deepcopy(model)
        model.state_dict()
    opt.close()


def test_attached_model_saves_the_master_weights_and_adopts_what_it_loads(team):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=team)
    opt.attach(model)
    train(model, opt, team)
    wanted = master_values(model, opt)
    assert not all(torch.equal(a, b) for a, b in zip(values(model), wanted, strict=True))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    assert_equal(loaded.values(), wanted)
    assert_equal(model[0].state_dict().values(), wanted[:2])  # a part of the model, too
    train(model, opt, team, start=3)
    model.load_state_dict(loaded)
    assert_equal(model.state_dict().values(), wanted)
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    opt.zero_grad()
    opt.step()  # without gradients: adopts and changes nothing
    assert_equal(master_values(model, opt), wanted)
    opt.close()


def test_loading_on_one_rank_only_is_an_error_on_all(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    if world.rank == 0:
        model.load_state_dict(net(1).state_dict())
    with pytest.raises(xc.MismatchError, match="rank 0 is in adopt"):
        opt.step()
    opt.close()


def test_loaded_weights_are_there_before_they_are_adopted(team):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=team)
    opt.attach(model)
    train(model, opt, team)
    other = net(1)
    model.load_state_dict(other.state_dict())
    assert opt.adoption_pending
    with opt.master_weights():
        assert_equal(values(model), values(other))
    if team.workers > 1:
        with opt.worker(1), pytest.raises(xc.UsageError, match="inside worker"):
            model.load_state_dict(other.state_dict())
    opt.close()
    assert opt.closed
    assert_equal(values(model), values(other))


def test_writing_in_master_weights_is_committed_from_rank_0(team):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=team)
    train(model, opt, team)
    with opt.master_weights(write=True), torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0 + team.rank)
    assert all((w == 2).all() for w in master_values(model, opt))
    train(model, opt, team)
    opt.close()


def test_error_while_writing_on_one_rank_reaches_all_and_commits_nothing(world):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=world)
    train(model, opt, world)
    before, x = master_values(model, opt), values(model)
    odd = world.rank == world.size - 1
    with pytest.raises(xc.UsageError, match="left by ZeroDivisionError"), opt.master_weights(write=True):
        if odd:
            1 / 0  # noqa: B018
    assert_equal(master_values(model, opt), before)
    if odd:
        assert_equal(values(model), x)
    opt.close()


def test_resuming_from_a_state_dict_gives_the_same_bits_as_going_on(team, kind):
    ours, _, hyper = kind
    extrapolated = ours is xc.ExtrapSGD
    model = net()
    opt = ours(model.parameters(), **hyper, world=team)
    train(model, opt, team)
    saved = opt.state_dict()
    torch.save(saved, io.BytesIO())
    other = net(1)
    resumed = ours(other.parameters(), **{**hyper, "lr": 0.7}, world=team)
    resumed.load_state_dict(saved)
    assert_equal(master_values(other, resumed), master_values(model, opt))
    assert resumed.param_groups[0]["lr"] == hyper["lr"]
    if not extrapolated:
        train(model, opt, team, start=3)
        train(other, resumed, team, start=3)
        assert_equal(master_values(other, resumed), master_values(model, opt))
    opt.close()
    resumed.close()


def test_state_goes_to_torch_and_comes_back(team, kind):
    """Half of the training here and half there, in both orders, is the whole of it in torch."""
    ours, theirs, hyper = kind
    if ours is xc.ExtrapSGD:
        ours = xc.SGD
    wanted_model = net()
    wanted = theirs(wanted_model.parameters(), **hyper)
    train(wanted_model, wanted, team, 6)

    model = net()
    opt = ours(model.parameters(), **hyper, world=team)
    train(model, opt, team, 3)
    there_model = net(1)
    there = theirs(there_model.parameters(), **hyper)
    with opt.master_weights():
        there_model.load_state_dict(model.state_dict())
    there.load_state_dict(opt.state_dict())
    train(there_model, there, team, 3, start=3)
    opt.close()

    first_model = net()
    first = theirs(first_model.parameters(), **hyper)
    train(first_model, first, team, 3)
    back_model = net(1)
    back_model.load_state_dict(first_model.state_dict())
    back = ours(back_model.parameters(), **hyper, world=team)
    back.load_state_dict(first.state_dict())
    train(back_model, back, team, 3, start=3)
    for got in (values(there_model), master_values(back_model, back)):
        for a, b in zip(got, values(wanted_model), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    back.close()


def test_state_dict_keeps_float32_masters_of_short_weights(team):
    model = net(dtype=torch.bfloat16)
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=team)
    train(model, opt, team)
    state = opt.state_dict()["state"]
    assert state[0]["master"].dtype == state[0]["momentum_buffer"].dtype == torch.float32
    other = net(1, torch.bfloat16)
    resumed = xc.SGD(other.parameters(), **MOMENTUM, world=team)
    resumed.load_state_dict(opt.state_dict())
    for i in range(4):
        assert torch.equal(resumed.master(i), opt.master(i))
    opt.close()
    resumed.close()


def test_unfitting_state_dicts_are_refused_on_all_ranks(world):
    model = net()
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=world)
    train(model, opt, world)
    before = master_values(model, opt)
    good = opt.state_dict()
    odd = world.rank == world.size - 1

    def broken(change):
        state = copy.deepcopy(good)
        if odd:
            change(state)
        return state

    cases = {
        "no param_groups": lambda s: s.pop("param_groups"),
        "groups of": lambda s: s["param_groups"][0]["params"].pop(),
        "no state": lambda s: s.pop("state"),
        "shape": lambda s: s["extrapcomm"]["master"].update({0: torch.zeros(3)}),
        "nesterov.*cannot change": lambda s: s["param_groups"][0].update(nesterov=True),
        "maximize cannot change": lambda s: s["param_groups"][0].update(maximize=True),
    }
    for text, change in cases.items():
        with pytest.raises(xc.UsageError, match=text):
            opt.load_state_dict(broken(change))
    if world.size > 1:
        with pytest.raises(xc.MismatchError, match="different options"):
            opt.load_state_dict(broken(lambda s: s["extrapcomm"]["master"][0].add_(1)))
    assert_equal(master_values(model, opt), before)
    opt.close()


def test_added_group_trains_with_the_others_and_they_keep_their_state(team):
    model, extra = net(), torch.nn.Parameter(torch.ones(5))
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=team)
    wanted_model, wanted_extra = net(), torch.nn.Parameter(torch.ones(5))
    wanted = torch.optim.SGD(wanted_model.parameters(), **MOMENTUM)
    train(model, opt, team)
    train(wanted_model, wanted, team)
    opt.add_param_group({"params": [extra], "lr": 0.5})
    wanted.add_param_group({"params": [wanted_extra], "lr": 0.5})
    for m, e, o in ((model, extra, opt), (wanted_model, wanted_extra, wanted)):
        o.zero_grad()
        for v in range(team.workers if o is opt else 1):
            with o.worker(v) if o is opt else contextless():
                (m(torch.ones(2, 7)).square().sum() + e.square().sum()).backward()
        o.step()
    got = [*master_values(model, opt)]
    with opt.master_weights():
        got.append(extra.detach().clone())
    for a, b in zip(got, [*values(wanted_model), wanted_extra.detach()], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    opt.close()


def test_tied_channels_last_frozen_empty_and_compiled_parameters_train(team):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
            self.tied = self.conv
            self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
            self.empty = torch.nn.Parameter(torch.zeros(0, 3))
            self.scalar = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            y = self.conv(x) * self.scalar + self.empty.sum()
            return self.tied(y[:, :2]) + self.frozen.view(1, 4, 1, 1)

    torch.manual_seed(0)
    model, x = Odd(), torch.randn(3, 2, 5, 5)
    wanted_model = copy.deepcopy(model)
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=team)
    wanted = torch.optim.SGD(wanted_model.parameters(), **MOMENTUM)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        for m, o in ((model, opt), (wanted_model, wanted)):
            o.zero_grad()
            for v in range(team.workers if o is opt else 1):
                with o.worker(v) if o is opt else contextless():
                    torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).square().mean().backward()
            o.step()
    for a, b in zip(master_values(model, opt), values(wanted_model), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert torch.equal(model.frozen, torch.ones(4))
    opt.close()


def test_saved_parameter_is_not_larger_than_itself(world):
    model = torch.nn.Sequential(torch.nn.Linear(10, 1, bias=False), torch.nn.Linear(1000, 1000))
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    buffer = io.BytesIO()
    torch.save(model[0].weight, buffer)
    assert len(buffer.getvalue()) < 4000
    opt.close()


def test_old_graph_raises_after_a_step_as_in_torch(world):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    loss = model(torch.ones(1, 7)).square().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    opt.close()


def test_two_optimizers_of_a_gan_and_two_worlds_do_not_disturb_each_other(world):
    half = COMM.Split(COMM.rank % 2, COMM.rank)
    with xc.World(half) as other_world:
        generator, critic = net(1), net(2)
        first = xc.ExtrapSGD(generator.parameters(), **MOMENTUM, world=world)
        second = xc.Adam(critic.parameters(), lr=0.01, world=other_world)
        for step in range(3):
            train(generator, first, world, 1, step)
            train(critic, second, other_world, 1, step)
        digests = world.comm.allgather([w.sum().item() for w in master_values(generator, first)])
        assert all(d == digests[0] for d in digests)
        first.close()
        second.close()
    half.Free()


def test_buffers_are_synchronised_on_request(world):
    model = torch.nn.BatchNorm1d(3)
    model.running_mean.fill_(world.rank)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.sync_buffers(model, "average")
    assert torch.allclose(model.running_mean, torch.tensor((world.size - 1) / 2))
    model.running_mean.fill_(world.rank + 1)
    opt.sync_buffers(model)
    assert (model.running_mean == 1).all()
    with pytest.raises(xc.UsageError, match="'broadcast' or 'average'"):
        opt.sync_buffers(model, "media" if world.rank == 0 else "average")
    opt.close()


@pytest.mark.parametrize("how", ["broadcast", "average"])
def test_buffers_of_every_type_and_layout_are_synchronised(world, how):
    model = torch.nn.Linear(2, 2)
    shares = {"broadcast": 0.0, "average": (world.size - 1) / 2}
    numbers = {
        "b16": torch.ones(3, dtype=torch.bfloat16),
        "f16": torch.ones(3, dtype=torch.float16),
        "f64": torch.ones((), dtype=torch.float64),
        "turned": torch.ones(2, 3).t(),
        "empty": torch.ones(0),
    }
    for name, ones in numbers.items():
        model.register_buffer(name, ones * world.rank)
    model.register_buffer("count", torch.tensor(7 + world.rank))
    model.register_buffer("flags", torch.tensor([world.rank == 0, True]))
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.sync_buffers(model, how)
    for name, ones in numbers.items():
        assert torch.equal(getattr(model, name), ones * shares[how])
    assert model.count == 7 and model.flags.all()
    opt.close()


def test_models_with_other_buffers_are_a_mismatch(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model = torch.nn.Linear(2, 2)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    model.register_buffer("odd", torch.zeros(3 + (world.rank == world.size - 1)))
    with pytest.raises(xc.MismatchError, match="sync_buffers of 1 buffers, 12 bytes.*16 bytes"):
        opt.sync_buffers(model)
    opt.close()


def test_closed_optimizer_leaves_the_master_weights_and_refuses_steps(world):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=world)
    train(model, opt, world)
    wanted = master_values(model, opt)
    world.comm.Barrier()
    opt.close()
    opt.close()
    assert_equal(values(model), wanted)
    for call in (opt.step, opt.adopt, lambda: opt.load_state_dict({})):
        with pytest.raises(xc.UsageError, match="closed"):
            call()
    for copying in (copy.copy, copy.deepcopy):
        with pytest.raises(xc.UsageError, match="cannot be copied"):
            copying(opt)
    assert np.isfinite(copy.deepcopy(model)[0].weight.detach().numpy()).all()


def test_local_state_dicts_hold_everything_once_and_resume_with_the_same_bits(team):
    model, wanted_model = net(), net()
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=team)
    wanted = xc.SGD(wanted_model.parameters(), **MOMENTUM, world=team)
    train(model, opt, team)
    train(wanted_model, wanted, team)
    saved = opt.local_state_dict()
    sizes = [sum(team.comm.allgather(len(s["momentum_buffer"]))) for s in saved["state"].values()]
    assert sizes == [p.numel() for p in model.parameters()]
    opt.close()

    other = net(1)
    resumed = xc.SGD(other.parameters(), **{**MOMENTUM, "lr": 5.0}, world=team)
    resumed.load_local_state_dict(saved)
    for m, o in ((other, resumed), (wanted_model, wanted)):
        train(m, o, team, 2, start=3)
    assert_equal(master_values(other, resumed), master_values(wanted_model, wanted))
    resumed.close()
    wanted.close()


def test_local_state_of_another_place_or_time_is_refused(worlds):
    world = worlds(2)
    model = net()
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=world)
    train(model, opt, world)
    saved, before = opt.local_state_dict(), master_values(model, opt)
    odd = world.rank == world.size - 1
    wrong = {**saved, "place": "rank 7 of 8, 1 workers each"} if odd else saved
    with pytest.raises(xc.UsageError, match="belongs to rank 7 of 8"):
        opt.load_local_state_dict(wrong)
    with pytest.raises(xc.UsageError, match="belongs to None"):
        opt.load_local_state_dict(opt.state_dict())
    if world.size > 1:
        later = copy.deepcopy(saved)
        if odd:
            for entry in later["state"].values():
                entry["step"] += 1
        with pytest.raises(xc.MismatchError, match="different options"):
            opt.load_local_state_dict(later)
    assert_equal(master_values(model, opt), before)
    opt.close()


def displaced(world, **hyper):
    """A model and its optimizer after two steps with gradients of each rank's own, at a point of its own."""
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **{**MOMENTUM, "inner_lr": 0.5, **hyper}, world=world)
    for _ in range(2):
        set_gradients(model, world)
        opt.step()
    return model, opt


def set_gradients(model, world):
    for p in model.parameters():
        p.grad = torch.full_like(p, world.rank + 1.0)


def test_outside_master_weights_the_model_is_at_its_own_displaced_point(world):
    model, opt = displaced(world)
    x = torch.ones(1, 7)
    outside = model(x)
    with opt.master_weights():
        assert not torch.equal(model(x), outside)
    for i, p in enumerate(model.parameters()):
        assert torch.equal(p, opt.master(i) - 0.5 * (world.rank + 1))
    assert torch.equal(model(x), outside)
    opt.close()


def test_model_that_is_not_attached_saves_what_it_holds(world):
    model, opt = displaced(world)
    x, w = values(model), [opt.master(i) for i in range(4)]
    assert_equal(model.state_dict().values(), x)
    assert not torch.equal(x[0], w[0])
    with opt.master_weights():
        assert_equal(model.state_dict().values(), w)
    opt.close()


def test_write_through_data_that_no_sample_meets_goes_unnoticed_and_is_lost(world):
    """Torch counts no version for it, and the engine compares four elements: the second of 350 is seldom among them."""
    (model, opt), (untouched, wanted) = displaced(world), displaced(world)
    model[0].weight.data[0, 1] += 1
    for each, its in ((model, opt), (untouched, wanted)):
        set_gradients(each, world)
        its.step()
    assert_equal(values(model), values(untouched))
    assert_equal(master_values(model, opt), master_values(untouched, wanted))
    opt.close()
    wanted.close()


def test_clipping_between_backward_and_step_uses_each_ranks_own_norm(world):
    w = torch.nn.Parameter(torch.zeros(4))
    opt = xc.SGD([w], lr=1.0, world=world)
    w.grad = torch.full((4,), 10.0 if world.rank else 0.5)
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    opt.step()
    torch.testing.assert_close(w.detach(), torch.full((4,), -0.5), rtol=1e-5, atol=0)
    opt.close()


def test_parameters_that_shared_a_storage_become_two(world):
    first = torch.nn.Parameter(torch.ones(3))
    second = torch.nn.Parameter(first.data)
    opt = xc.SGD([first, second], lr=0.5, world=world)
    first.grad, second.grad = torch.ones(3), torch.full((3,), 2.0)
    opt.step()
    assert first.tolist() == [0.5] * 3
    assert second.tolist() == [0.0] * 3
    opt.close()


def test_optimizer_dropped_without_closing_leaves_the_displaced_weights(world):
    model, opt = displaced(world)
    x, w = values(model), opt.master(0)
    world.comm.Barrier()
    del opt
    gc.collect()
    assert_equal(values(model), x)
    assert not torch.equal(model[0].weight, w)


def test_loaded_state_starts_every_worker_at_the_master_weights(world):
    model, opt = displaced(world)
    saved = opt.state_dict()
    set_gradients(model, world)
    opt.step()
    opt.load_state_dict(saved)
    for i, p in enumerate(model.parameters()):
        assert torch.equal(p, saved["extrapcomm"]["master"][i])
    opt.close()


@pytest.mark.parametrize(
    ("name", "text"), [("momentum", "built without momentum"), ("nesterov", "nesterov.*cannot change")]
)
def test_flags_and_momentum_from_zero_cannot_change(world, name, text):
    hyper = {"momentum": 0.0} if name == "momentum" else {}
    model, opt = displaced(world, **hyper)
    before = values(model)
    if world.rank == world.size - 1:
        opt.param_groups[0][name] = 0.9
    with pytest.raises(xc.UsageError, match=text):
        opt.step()
    assert_equal(values(model), before)
    opt.close()


def test_parameter_frozen_later_keeps_zero_gradients_in_view_until_they_are_dropped(world):
    w = torch.nn.Parameter(torch.full((3,), 4.0))
    opt = xc.SGD([w], lr=0.5, weight_decay=1.0, world=world, gradients="view")
    w.sum().backward()
    opt.step()
    assert w.tolist() == [1.5] * 3
    w.requires_grad_(False)
    opt.zero_grad()
    opt.step()
    assert w.tolist() == [0.75] * 3
    opt.zero_grad(set_to_none=True)
    opt.step()
    assert w.tolist() == [0.75] * 3
    opt.close()


def test_forked_process_cannot_touch_its_parents_gradients(worlds):
    world = worlds(2)
    weight = torch.nn.Parameter(torch.zeros(3))
    for gradients in ("copy", "hook", "view"):
        weight.grad = None
        opt = xc.SGD([weight], lr=1.0, world=world, gradients=gradients)
        for v in range(2):
            with opt.worker(v):
                weight.sum().backward()
        before = weight.detach().clone()
        if (child := os.fork()) == 0:
            try_everything_in_a_fork(opt, weight)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        opt.step()
        torch.testing.assert_close(weight.detach(), before - 1)
        opt.close()


def try_everything_in_a_fork(opt, weight):
    """Ends the process; 0 if everything was refused."""
    refused = 0
    weight.grad = torch.full((3,), 100.0)
    for call in (opt.step, opt.zero_grad, opt.worker(1).__enter__, opt.adopt):
        try:
            call()
        except xc.UsageError:
            refused += 1
    weight.grad = None
    weight.sum().backward()
    os._exit(4 - refused)


def test_a_forked_process_cannot_be_a_rank(world):
    if (child := os.fork()) == 0:
        try:
            xc.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
        except xc.UsageError as error:
            os._exit(0 if "forked from a rank" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_uncounted_writes_after_the_master_weights_were_changed_are_noticed(world):
    weight = torch.nn.Parameter(torch.ones(1000))
    opt = xc.SGD([weight], lr=0.1, world=world)
    for _ in range(2):
        with opt.master_weights(write=True), torch.no_grad():
            weight.mul_(2.0)
        weight.grad = torch.zeros(1000)
        opt.step()
    with opt.master_weights(write=True), torch.no_grad():
        weight.mul_(2.0)
    weight.data.fill_(5.0)
    with pytest.raises(xc.UsageError, match="was written"):
        opt.step()
    opt.adopt()
    opt.step()
    assert (weight == 5).all()
    opt.close()


def test_parameters_that_are_never_trained_are_named(world):
    frozen = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(xc.UsageError, match=r"int8.*requires_grad"):
        xc.SGD([torch.nn.Parameter(torch.ones(3)), frozen], lr=0.1, world=world)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
def test_what_a_forked_process_writes_stays_there(worlds, gradients, closed):
    """As torch's own tensors; the memory is shared with other ranks, and not with children."""
    weight = torch.nn.Parameter(torch.zeros(3000))
    opt = xc.SGD([weight], lr=1.0, world=worlds(1), gradients=gradients)
    weight.sum().backward()
    opt.step()
    opt.zero_grad(set_to_none=False)
    weight.sum().backward()
    if closed:
        opt.close()
    before = weight.detach().clone(), weight.grad.clone()
    if (child := os.fork()) == 0:
        (weight.sum() * 5).backward()
        seen = bool((weight.grad == 6).all())
        with torch.no_grad():
            weight.fill_(7.0)
        if (grandchild := os.fork()) == 0:
            os._exit(0 if bool((weight == 7).all() and (weight.grad == 6).all()) else 1)
        seen = seen and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if seen and bool((weight == 7).all()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(weight.detach(), before[0]) and torch.equal(weight.grad, before[1])
    if not closed:
        opt.step()
        torch.testing.assert_close(weight.detach(), before[0] - 1)
        opt.close()


# --- loading in every order -----------------------------------------------------------------------------------------


def loaded_values(model, value):
    return {name: torch.full_like(tensor, value) for name, tensor in model.state_dict().items()}


def assert_all(tensors, value):
    for tensor in tensors:
        assert (tensor == value).all(), tensor


@pytest.fixture
def trained(team):
    """(model, optimizer, world), attached and displaced."""
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), **MOMENTUM, world=team)
    opt.attach(model)
    train(model, opt, team)
    yield model, opt, team
    opt.close()


def test_loaded_weights_survive_loading_a_state_without_weights(trained):
    model, opt, _ = trained
    twin = net()
    plain = torch.optim.SGD(twin.parameters(), **MOMENTUM)
    twin(torch.ones(2, 7)).sum().backward()
    plain.step()
    model.load_state_dict(loaded_values(model, 7.0))
    opt.load_state_dict(plain.state_dict())
    assert_all(values(model), 7)
    assert opt.adoption_pending
    opt.adopt()
    assert_all(master_values(model, opt), 7)
    torch.testing.assert_close(
        opt.state_dict()["state"][0]["momentum_buffer"], plain.state_dict()["state"][0]["momentum_buffer"]
    )


def test_unnoticed_writes_before_loading_a_state_without_weights_are_refused(team):
    model = net()
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=team)
    state = opt.state_dict()
    del state["extrapcomm"]
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    with pytest.raises(xc.UsageError, match=r"parameter .* was written"):
        opt.load_state_dict(state)
    opt.close()


def test_loaded_weights_survive_a_new_group(trained):
    model, opt, _ = trained
    model.load_state_dict(loaded_values(model, 7.0))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert_all(values(model), 7)
    assert_all([opt.master(i) for i in range(4)], 7)


def test_part_that_is_not_loaded_keeps_the_master_weights(trained):
    model, opt, _ = trained
    before = master_values(model, opt)
    model[0].load_state_dict(loaded_values(model[0], 7.0))
    opt.adopt()
    assert_all(master_values(model, opt)[:2], 7)
    assert_equal(master_values(model, opt)[2:], before[2:])


def test_copies_and_pickles_of_an_attached_model_know_no_optimizer(trained):
    model, opt, _ = trained
    before = master_values(model, opt)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = values(other)
        assert_equal(other.state_dict().values(), own)
        other.load_state_dict(loaded_values(other, 7.0))
        assert not opt.adoption_pending
    assert_equal(master_values(model, opt), before)


def test_every_worker_sees_what_was_loaded(trained):
    model, opt, team = trained
    model.load_state_dict(loaded_values(model, 7.0))
    for v in range(team.workers):
        with opt.worker(v):
            assert_all(values(model), 7)
            with opt.master_weights():
                assert_all(values(model), 7)


def test_attached_model_saves_groups_that_were_added_later(team):
    model = net()
    head = list(model[2].parameters())
    opt = xc.ExtrapSGD(model[0].parameters(), **MOMENTUM, world=team)
    opt.attach(model)
    opt.add_param_group({"params": head})
    train(model, opt, team)
    assert_equal(model.state_dict().values(), master_values(model, opt))
    model[2].load_state_dict(loaded_values(model[2], 7.0))
    assert opt.adoption_pending
    opt.close()


def test_exception_while_writing_over_loaded_weights_commits_nothing(trained):
    model, opt, _ = trained
    model.load_state_dict(loaded_values(model, 7.0))
    with pytest.raises(xc.UsageError, match="left by KeyError"), opt.master_weights(write=True):
        with torch.no_grad():
            model[0].weight.fill_(99.0)
        raise KeyError
    assert_all(master_values(model, opt), 7)
    train(model, opt, opt.world, start=3)


def test_refused_group_leaves_the_optimizer_as_it_was(trained):
    model, opt, team = trained
    before, odd = master_values(model, opt), team.rank == team.size - 1
    for dtype in (torch.complex64, torch.float64):
        with pytest.raises(xc.UsageError):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, dtype=dtype))]})
    inside = opt.master_weights() if odd else contextless()
    with inside, pytest.raises(xc.UsageError, match="inside master_weights"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert len(opt.param_groups) == 1
    assert_equal(master_values(model, opt), before)
    train(model, opt, team, start=3)


def test_gradient_that_was_dropped_before_the_step_does_not_count(worlds):
    for gradients in ("copy", "hook", "view"):
        for workers in (1, 2):
            world = worlds(workers)
            a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
            opt = xc.SGD([a, b], lr=1.0, world=world, gradients=gradients)
            for v in range(workers):
                with opt.worker(v):
                    (a.sum() * 1000).backward()
            opt.zero_grad(set_to_none=True)
            for v in range(workers):
                with opt.worker(v):
                    (b if world.rank == 0 and v == 0 else a + b).sum().backward()
            opt.step()
            torch.testing.assert_close(opt.master(0), torch.full((3,), -(world.K - 1.0) / world.K))
            opt.close()


def test_local_state_with_holes_is_refused(world):
    model = net()
    opt = xc.SGD(model.parameters(), **MOMENTUM, world=world)
    train(model, opt, world)
    saved = opt.local_state_dict()
    for text, change in {
        "no 'master'": lambda s: s["state"][0].update(master=torch.ones(1, 1)),
        "no 'momentum_buffer'": lambda s: s["state"][1].pop("momentum_buffer"),
        "has 3 parameters": lambda s: s["state"].pop(0),
        "must not be negative": lambda s: s["state"][2].update(step=-1),
    }.items():
        broken = copy.deepcopy(saved)
        change(broken)
        with pytest.raises(xc.UsageError, match=text):
            opt.load_local_state_dict(broken)
    opt.close()


def test_writing_that_fails_on_one_rank_leaves_every_rank_as_it_was(world):
    model, opt = displaced(world)
    before, masters = values(model), master_values(model, opt)
    with pytest.raises((xc.UsageError, KeyError), match="odd"), opt.master_weights(write=True):
        with torch.no_grad():
            model[0].weight.fill_(3.0)
        if world.rank == world.size - 1:
            raise KeyError("odd")
    assert_equal(values(model), before)
    assert_equal(master_values(model, opt), masters)
    set_gradients(model, world)
    opt.step()
    opt.close()
