"""Schedules that end at zero end beside it: what is negligible beside a number's earlier values counts as zero."""

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")
schedulers = torch.optim.lr_scheduler

OPTIMIZERS = {
    "SGD": (xc.SGD, {"momentum": 0.9}),
    "ExtrapSGD": (xc.ExtrapSGD, {"inner_lr": "lr"}),
    "a function for inner_lr": (xc.ExtrapSGD, {"inner_lr": lambda lr: 0.5 * lr}),
    "Adam": (xc.Adam, {}),
    "LARS": (xc.LARS, {}),
    "LAMB": (xc.LAMB, {}),
    "EG": (xc.EG, {}),
    "VRSGD": (xc.VRSGD, {}),
    "AdaScale": (xc.SGD, {"gain": "AdaScale"}),
}


def made(kind, world):
    optimizer, options = OPTIMIZERS[kind]
    if options.get("gain"):
        if world.K < 2:
            pytest.skip("a gain takes two workers")
        options = {**options, "gain": xc.AdaScale()}
    p = torch.nn.Parameter(torch.ones(4))
    return p, optimizer([p], lr=0.1, world=world, **options)


def step(opt, p, world):
    for v in range(world.workers):
        with opt.worker(v):
            p.grad = torch.full((4,), 1.0 + v + world.rank)
    opt.step()


def own(world, tiny):
    """Another number on each rank, as rounding gives."""
    return tiny * (world.rank + 1) * (-1) ** world.rank


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("tiny", [-2e-18, 2e-18, 9e-14, 0.0, -0.0])
def test_negligible_rate_has_the_bits_of_zero(team, kind, tiny):
    (p, opt), (q, exact) = made(kind, team), made(kind, team)
    step(opt, p, team)
    step(exact, q, team)
    opt.param_groups[0]["lr"] = tiny if tiny > 1e-15 else own(team, tiny)
    exact.param_groups[0]["lr"] = 0.0
    step(opt, p, team)
    step(exact, q, team)
    assert torch.equal(opt.master(0), exact.master(0))
    assert torch.equal(p, q) and torch.equal(p, opt.master(0))  # the inner rate vanishes, too
    opt.close()
    exact.close()


def test_linear_schedule_to_zero_ends_well(team):
    p, opt = made("SGD", team)
    scheduler = schedulers.LinearLR(opt, start_factor=1.0, end_factor=0.0, total_iters=7)
    seen = []
    for _ in range(9):
        step(opt, p, team)
        scheduler.step()
        seen.append(opt.param_groups[0]["lr"])
    assert min(seen) < 1e-15  # here it is 0 or beside it
    opt.close()


@pytest.mark.parametrize("wrong", [-1e-3, -1e-12])
def test_rate_that_is_really_negative_stays_an_error_on_all_ranks(world, wrong):
    p, opt = made("SGD", world)
    step(opt, p, world)
    if world.rank == world.size - 1:
        opt.param_groups[0]["lr"] = wrong
    with pytest.raises(xc.UsageError, match="lr must not be negative"):
        step(opt, p, world)
    opt.close()


def test_small_rates_that_are_not_negligible_stay(world):
    p, opt = made("SGD", world)
    step(opt, p, world)
    opt.param_groups[0]["lr"] = 1e-9
    before = opt.master(0)
    p.grad = torch.full((4,), 1e9)
    opt.step()
    assert not torch.equal(opt.master(0), before)
    opt.close()


NUMBERS = {
    "weight_decay": 1e-2,
    "momentum": 0.9,
    "dampening": 0.5,
    "inner_lr": 0.3,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_a_group_may_vanish(world, name):
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    options = {**NUMBERS, "lr": 0.1, "world": world}
    opt, exact = xc.ExtrapSGD([p], **options), xc.ExtrapSGD([q], **options)
    for optimizer, parameter in ((opt, p), (exact, q)):
        step(optimizer, parameter, world)
    opt.param_groups[0][name], exact.param_groups[0][name] = own(world, 1e-19), 0.0
    for optimizer, parameter in ((opt, p), (exact, q)):
        step(optimizer, parameter, world)
    assert torch.equal(p, q) and torch.equal(opt.master(0), exact.master(0))
    opt.close()
    exact.close()


def test_refused_rate_does_not_count_as_one_that_a_number_has_had(world):
    p, opt = made("SGD", world)
    opt.param_groups[0]["lr"] = 1e30 if world.rank == 0 else 1.0
    if world.size > 1:
        with pytest.raises(xc.MismatchError):
            step(opt, p, world)
    opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"] = 1e40, 2.0
    opt.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(xc.UsageError):
        step(opt, p, world)
    opt.param_groups[0].update(lr=0.5, momentum=0.9, weight_decay=0.0)
    p.grad = torch.ones(4)
    opt.step()
    assert p.tolist() == [0.5] * 4
    opt.close()


def test_groups_know_their_own_largest_numbers(world):
    p, opt = made("SGD", world)
    step(opt, p, world)
    added = torch.nn.Parameter(torch.ones(4))
    opt.add_param_group({"params": [added], "lr": 1e-14})
    p.grad, added.grad = torch.ones(4), torch.full((4,), 1e14)
    opt.step()
    assert added.abs().max() < 1e-3
    opt.param_groups[0]["lr"] = -1e-18
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0})
    opt.param_groups[1]["lr"] = -1e-18  # no longer beside zero: this group's were small
    p.grad, added.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(xc.UsageError, match="lr must not be negative"):
        opt.step()
    opt.close()


def test_resumed_run_knows_the_rate_that_it_was_constructed_with(world):
    p, opt = made("SGD", world)
    step(opt, p, world)
    state = opt.state_dict()
    opt.close()
    state["param_groups"][0]["lr"] = -2e-18
    p, opt = made("SGD", world)
    opt.load_state_dict(state)
    step(opt, p, world)
    opt.close()


@pytest.mark.parametrize("tiny", [-2e-18, 2e-18])
def test_engine_takes_a_negligible_rate_as_zero(team, tiny):
    engine = xc.Engine(team, np.ones(3), lr=0.5, extrapolation="local")
    for worker in engine.workers:
        worker.grads[:] = 1
    engine.step()
    before = engine.master().copy()
    engine.step(lr=own(team, tiny))
    assert engine.master().tolist() == engine.weights.tolist() == before.tolist()
    with pytest.raises(xc.UsageError, match="lr must not be negative"):
        engine.step(lr=-1e-3)
    engine.close()


def test_scale_that_a_rule_revises_by_itself_may_become_small(world):
    p = torch.nn.Parameter(torch.ones(4))
    opt = xc.EG([p], lr=0.1, world=world)
    step(opt, p, world)
    opt.param_groups[0]["scale"] = 1e-14
    before = opt.master(0)
    p.grad = torch.full((4,), 1e12)
    opt.step()
    assert opt.param_groups[0]["scale"] > 0 and not torch.equal(opt.master(0), before)
    opt.close()
