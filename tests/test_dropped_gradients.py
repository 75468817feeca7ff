"""Gradients that only the bound worker lost, as by model.zero_grad(), are noticed, and legal loops run."""

import contextlib
import importlib

import pytest
from conftest import COMM

import extrapcomm as xc

torch = pytest.importorskip("torch")

MODES = ("copy", "hook", "view")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 5, generator=generator)).square().sum().backward()


def started(worlds, workers, mode="copy", steps=1):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.01, world=worlds(workers), gradients=mode)
    for step in range(steps):
        opt.zero_grad()
        iterate(model, opt, workers, step)
        opt.step()
    return model, opt


def iterate(model, opt, workers, seed):
    for v in range(workers):
        with opt.worker(v):
            backward(model, seed)


def drop_by_hand(model):
    for param in model.parameters():
        param.grad = None


DROPS = {
    "none": lambda model: model.zero_grad(),
    "zeros": lambda model: model.zero_grad(set_to_none=False),
    "by hand": drop_by_hand,
}
dropping = pytest.mark.parametrize("drop", DROPS)
modes = pytest.mark.parametrize("mode", MODES)
CALL = r"call opt\.zero_grad\(\)"


def assert_refused_until_zero_grad(model, opt, workers, words):
    before = [opt.master(i) for i in range(4)]
    for _ in range(2):
        with pytest.raises(xc.UsageError, match=words):
            opt.step()
    assert all(torch.equal(opt.master(i), w) for i, w in enumerate(before))
    opt.zero_grad()
    iterate(model, opt, workers, 7)
    opt.step()
    opt.close()


def on_the_last_rank(action, *arguments):
    if COMM.rank == COMM.size - 1:
        action(*arguments)


@dropping
@modes
def test_gradients_dropped_after_a_micro_batch_are_an_error_on_all_ranks(worlds, mode, drop):
    model, opt = started(worlds, 1, mode)
    opt.zero_grad()
    with opt.no_sync():
        backward(model, 1)
    on_the_last_rank(DROPS[drop], model)
    backward(model, 2)
    assert_refused_until_zero_grad(model, opt, 1, rf"worker 0 .* dropped after no_sync\(\).*{CALL}")


@dropping
def test_so_they_are_without_another_backward(worlds, drop):
    model, opt = started(worlds, 1)
    opt.zero_grad()
    with opt.no_sync():
        backward(model, 1)
    on_the_last_rank(DROPS[drop], model)
    assert_refused_until_zero_grad(model, opt, 1, rf"dropped after no_sync\(\).*{CALL}")


@dropping
def test_so_they_are_between_two_micro_batches(worlds, drop):
    model, opt = started(worlds, 1)
    opt.zero_grad()
    for part in range(3):
        with opt.no_sync():
            if part == 1:
                on_the_last_rank(DROPS[drop], model)
            backward(model, part)
    backward(model, 3)
    assert_refused_until_zero_grad(model, opt, 1, rf"dropped after no_sync\(\).*{CALL}")


@dropping
@modes
def test_gradients_of_one_worker_dropped_after_a_step_are_an_error_on_all_ranks(worlds, mode, drop):
    model, opt = started(worlds, 2, mode)
    on_the_last_rank(DROPS[drop], model)
    iterate(model, opt, 2, 1)
    assert_refused_until_zero_grad(
        model, opt, 2, rf"worker 0 .* dropped, .* worker 1 still has its old ones: {CALL}"
    )


@dropping
@modes
def test_so_they_are_where_a_batch_is_given_up_before_its_step(worlds, mode, drop):
    model, opt = started(worlds, 2, mode)
    opt.zero_grad()
    iterate(model, opt, 2, 1)
    on_the_last_rank(DROPS[drop], model)
    iterate(model, opt, 2, 2)
    assert_refused_until_zero_grad(model, opt, 2, rf"worker 1 still has its old ones: {CALL}")


@dropping
def test_so_they_are_when_the_second_worker_drops_its_own(worlds, drop):
    model, opt = started(worlds, 2)
    iterate(model, opt, 2, 1)
    with opt.worker(1):
        on_the_last_rank(DROPS[drop], model)
        backward(model, 2)
    assert_refused_until_zero_grad(model, opt, 2, rf"worker 1 .* worker 0 still has its old ones: {CALL}")


# -- Legal loops ----------------------------------------------------------------------------------------------------


def same_as_opt_zero_grad(worlds, workers, mode, loop):
    """Train by a loop that is given the model's or the optimizer's zero_grad, and compare the weights."""
    weights = []
    for forwarded in (False, True):
        model, opt = started(worlds, workers, mode, steps=2)
        loop(model, opt, opt.zero_grad if forwarded else model.zero_grad)
        weights.append([opt.master(i) for i in range(4)])
        opt.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@modes
def test_model_zero_grad_is_as_good_with_one_worker_and_no_micro_batches(worlds, mode):
    def loop(model, opt, zero_grad):
        for step in range(4):
            zero_grad(set_to_none=step % 2 == 0)
            backward(model, step)
            opt.step()

    same_as_opt_zero_grad(worlds, 1, mode, loop)


@modes
def test_model_zero_grad_is_as_good_before_the_first_micro_batch(worlds, mode):
    def loop(model, opt, zero_grad):
        for step in range(4):
            for part in range(3):
                with opt.no_sync() if part < 2 else contextlib.nullcontext():
                    if part == 0:
                        zero_grad(set_to_none=step % 2 == 0)
                    backward(model, 10 * step + part)
            opt.step()

    same_as_opt_zero_grad(worlds, 1, mode, loop)


@modes
@dropping
def test_each_worker_may_drop_its_own_gradients_in_its_turn(worlds, mode, drop):
    weights = []
    for each_its_own in (True, False):
        model, opt = started(worlds, 2, mode, steps=2)
        for step in range(4):
            if not each_its_own:
                opt.zero_grad()
            for v in range(2):
                with opt.worker(v):
                    if each_its_own:
                        DROPS[drop](model)
                    backward(model, 10 * step + v)
            opt.step()
        weights.append([opt.master(i) for i in range(4)])
        opt.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
@modes
def test_some_layers_may_lose_their_gradients_between_micro_batches(worlds, mode, workers):
    """As DINO does with the last layer; and as torch does when clipping makes all of them smaller."""
    model, opt = started(worlds, workers, mode)
    for step in range(3):
        opt.zero_grad()
        for part in range(3):
            with opt.no_sync() if part < 2 else contextlib.nullcontext():
                iterate(model, opt, workers, 10 * step + part)
                model[2].weight.grad = model[2].bias.grad = None
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
    opt.close()


def test_gradients_may_be_assigned_in_every_turn_zeros_included(worlds):
    model, opt = started(worlds, 2)
    for step in range(4):
        for v in range(2):
            with opt.worker(v):
                for param in model.parameters():
                    param.grad = torch.full_like(param, float((step + v) % 2))
        opt.step()
    opt.close()


def test_parameters_without_any_gradient_are_no_false_alarm(worlds):
    for workers in (1, 2):
        model, opt = started(worlds, workers)
        opt.zero_grad()
        with opt.no_sync():
            for v in range(workers):
                with opt.worker(v):
                    model.zero_grad()
        opt.step()
        for v in range(workers):
            with opt.worker(v):
                (model[0].weight * 0.0).sum().backward()
        opt.step()
        iterate(model, opt, workers, 1)
        opt.step()
        opt.close()


def test_workers_that_had_no_gradients_before_are_no_false_alarm(worlds):
    model, opt = started(worlds, 2)
    opt.zero_grad()
    backward(model, 1)
    opt.step()
    for v in range(2):
        with opt.worker(v):
            model.zero_grad()
            backward(model, 2 + v)
    opt.step()
    opt.close()


def test_a_closed_optimizer_leaves_no_hooks(worlds):
    model, opt = started(worlds, 2)
    opt.zero_grad()
    iterate(model, opt, 2, 1)
    opt.step()
    opt.close()
    assert not any(param._backward_hooks or param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.parametrize("zeros", [False, True], ids=["None", "zeros"])
@pytest.mark.parametrize("which", ["biases", "weights", "first layer"])
def test_gradients_of_some_parameters_may_be_dropped_after_a_micro_batch(worlds, which, zeros):
    model, opt = started(worlds, 1)
    opt.zero_grad()
    with opt.no_sync():
        backward(model, 1)
    chosen = {
        "biases": [model[0].bias, model[2].bias],
        "weights": [model[0].weight, model[2].weight],
        "first layer": list(model[0].parameters()),
    }
    for param in chosen[which]:
        if zeros:
            param.grad.zero_()
        else:
            param.grad = None
    backward(model, 2)
    opt.step()
    opt.close()


@pytest.mark.parametrize("batches", [2, 3])
def test_gradients_that_cancel_were_not_dropped(worlds, batches):
    param = torch.nn.Parameter(torch.ones(4))
    opt = xc.SGD([param], lr=0.1, world=worlds(1))
    for sign in (1, -1, 1)[: batches - 1]:
        with opt.no_sync():
            (sign * param).sum().backward()
    (-param).sum().backward()
    opt.step()
    wanted = 1 - 0.1 * {2: 0, 3: -1}[batches] / batches
    torch.testing.assert_close(opt.master(0), torch.full((4,), wanted))
    opt.close()


# -- Several backward passes in one micro-batch ---------------------------------------------------------------------


@modes
@pytest.mark.parametrize("workers", [1, 2])
def test_several_micro_batches_in_one_no_sync_are_an_error_on_all_ranks(worlds, mode, workers):
    model, opt = started(worlds, workers, mode)
    opt.zero_grad()
    with opt.no_sync():
        for part in range(3 if COMM.rank == COMM.size - 1 else 1):
            iterate(model, opt, workers, part)
    iterate(model, opt, workers, 3)
    assert_refused_until_zero_grad(model, opt, workers, "3 backward passes came within one no_sync")


def test_their_sum_needs_no_number_of_micro_batches(worlds):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(1), accumulation="sum")
    other = net()
    with opt.no_sync():
        for part in range(3):
            backward(model, part)
            backward(other, part)
    backward(model, 3)
    backward(other, 3)
    opt.step()
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            torch.testing.assert_close(opt.master(i), p - 0.1 * p.grad)
    opt.close()


def test_losses_that_share_a_part_of_the_model_are_one_micro_batch(worlds):
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(5, 8), torch.nn.ModuleList([torch.nn.Linear(8, 1) for _ in range(2)])
    opt = xc.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1, world=worlds(1))
    for last in (False, True):
        with contextlib.nullcontext() if last else opt.no_sync():
            for head in heads:
                head(trunk(torch.ones(2, 5))).sum().backward()
    opt.step()
    opt.close()


# -- Gradients that were changed by hand ----------------------------------------------------------------------------

CHANGES = {
    "one element zeroed": (lambda grad: grad[0].zero_(), False),
    "masked": (lambda grad: grad.mul_((grad > 0).float()), False),
    "clipped": (lambda grad: grad.mul_(0.5), True),
    "noise": (lambda grad: grad.add_(0.1), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_gradients_that_were_scaled_draw_a_warning(worlds, caplog, change):
    make, warns = CHANGES[change]
    model, opt = started(worlds, 2)
    opt.zero_grad()
    for v in range(2):
        with opt.worker(v):
            backward(model, v)
            make(model[0].weight.grad)
    opt.step()
    assert ("changed between backward() and step()" in caplog.text) is warns
    opt.close()


def test_checkpoints_that_run_backward_inside_backward_are_one_pass(worlds):
    checkpoint = importlib.import_module("torch.utils.checkpoint")
    layer = torch.nn.Linear(3, 3)
    opt = xc.SGD(layer.parameters(), lr=0.1, world=worlds(1))
    x = torch.ones(2, 3, requires_grad=True)

    def run():
        h = x
        for _ in range(3):
            h = checkpoint.checkpoint(layer, h, use_reentrant=True)
        h.square().sum().backward()

    with opt.no_sync():
        run()
    run()
    opt.step()
    opt.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_in_no_sync_matters_after_a_backward_only(worlds, when):
    model, opt = started(worlds, 1)
    opt.zero_grad()
    with contextlib.suppress(ZeroDivisionError), opt.no_sync():
        if when == "after":
            backward(model, 1)
        raise ZeroDivisionError
    backward(model, 2)
    if when == "after":
        assert_refused_until_zero_grad(model, opt, 1, "an exception left no_sync")
    else:
        opt.step()
        opt.close()


def test_several_passes_through_a_checkpoint_are_several(worlds):
    checkpoint = importlib.import_module("torch.utils.checkpoint")
    layer = torch.nn.Linear(2, 1, bias=False)
    opt = xc.SGD(layer.parameters(), lr=1.0, world=worlds(1))

    def run():
        x = torch.ones(1, 2, requires_grad=True)
        checkpoint.checkpoint(layer, x, use_reentrant=True).sum().backward()

    with opt.no_sync():
        run()
        run()
    run()
    with pytest.raises(xc.UsageError, match="2 backward passes"):
        opt.step()
    opt.close()


def test_an_exception_after_a_pass_through_the_middle_is_noticed(worlds):
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
    opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(1))
    with contextlib.suppress(KeyError), opt.no_sync():
        model[1](torch.ones(1, 2)).sum().backward()
        raise KeyError
    with pytest.raises(xc.UsageError, match="an exception left no_sync"):
        opt.step()
    opt.zero_grad()
    opt.close()


def test_each_worker_that_zeroes_its_own_gradients_begins_anew(worlds):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(2))
    opt.attach(model)
    with contextlib.suppress(KeyError), opt.no_sync():
        iterate(model, opt, 2, 1)
        raise KeyError
    for v in range(2):
        with opt.worker(v):
            model.zero_grad()
            backward(model, v)
    opt.step()
    opt.close()


@pytest.mark.parametrize("inside", [False, True])
def test_zeroing_inside_worker_forgets_what_adascale_has_measured(worlds, inside):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(1), gain=xc.AdaScale(scale=4.0))
    if opt.world.K > 1:
        pytest.skip("one worker alone compares its micro-batches")
    opt.attach(model)
    x = 1 + 0.3 * torch.randn(3, 3, 4)
    with opt.worker(0) if inside else contextlib.nullcontext():
        with opt.no_sync():
            model(9 * x[0]).square().sum().backward()
        model.zero_grad()
        with opt.no_sync():
            model(x[1]).square().sum().backward()
        model(x[2]).square().sum().backward()
    opt.step()
    assert opt.gain == pytest.approx(1.2475, abs=1e-3)
    opt.close()


@pytest.mark.parametrize("frozen", ["the first", "the last", "both"])
def test_several_micro_batches_are_noticed_though_the_ends_of_the_model_were_frozen(worlds, frozen):
    """Hooks of the first and the last trained parameter tell of backward passes: of those that are trained now."""
    model, opt = started(worlds, 1)
    ends = {"the first": [0], "the last": [-1], "both": [0, -1]}[frozen]
    for i in ends:
        list(model.parameters())[i].requires_grad_(False)
    opt.zero_grad()
    with opt.no_sync():
        for part in range(2):
            backward(model, part)
    backward(model, 3)
    assert_refused_until_zero_grad(model, opt, 1, "2 backward passes came within one no_sync")


# -- Gradients that lie in shared memory when they are dropped ------------------------------------------------------


def zero_in_place(opt, model, how):
    {"optimizer": opt, "model": model, "part": model[0]}[how].zero_grad(set_to_none=False)


@modes
@pytest.mark.parametrize("how", ["optimizer", "model", "part"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("absent_before", [False, True], ids=["at first", "again"])
def test_a_gradient_that_was_zeroed_and_dropped_on_one_rank_counts_as_zeros(
    worlds, mode, how, workers, absent_before
):
    """zero_grad(set_to_none=False) lets autograd write to shared memory; what is dropped there must not be summed."""
    model, world = net(), worlds(workers)
    opt = xc.SGD(model.parameters(), lr=1.0, world=world, gradients=mode)
    opt.attach(model)
    loses = COMM.rank == COMM.size - 1
    if absent_before:
        iterate(model, opt, workers, 0)
        if loses:
            model[0].weight.grad = None
        opt.step()
    before = opt.master(0).clone()
    iterate(model, opt, workers, 1)
    for v in range(workers if how != "optimizer" else 1):
        with opt.worker(v):
            zero_in_place(opt, model, how)
    for v in range(workers):
        with opt.worker(v):
            model[0].weight.sum().mul(2.0).backward()
            if loses and v == workers - 1:
                model[0].weight.grad = None
    opt.step()
    wanted = before - 2.0 * (world.K - 1) / world.K
    torch.testing.assert_close(opt.master(0), wanted)
    opt.close()


@modes
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("drop", ["none", "zeros"])
def test_a_worker_drops_its_own_gradients_in_its_own_turn(worlds, workers, drop, mode):
    """An attached model hears of it, so that the others' gradients are whole: those of the dropped one are zeros."""
    model, opt = started(worlds, workers, mode)
    opt.attach(model)
    opt.zero_grad()
    iterate(model, opt, workers, 1)
    with opt.worker(0):
        wanted = [p.grad * (workers - 1) / workers for p in model.parameters()]
    before = [opt.master(i) for i in range(4)]
    with opt.worker(workers - 1):
        DROPS[drop](model)
    opt.step()
    for i, (was, mean) in enumerate(zip(before, wanted, strict=True)):
        torch.testing.assert_close(opt.master(i), was - 0.01 * mean)
    opt.close()


@modes
@pytest.mark.parametrize("whole", [True, False])
def test_kept_gradients_of_a_worker_that_is_not_bound_keep_their_values(worlds, mode, whole):
    model, opt = started(worlds, 2, mode)
    opt.attach(model)
    opt.zero_grad(set_to_none=True)
    iterate(model, opt, 2, 1)
    with opt.worker(1):
        kept = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in kept]
    opt.step()
    if whole:
        opt.zero_grad(set_to_none=True)
    else:
        for module in (model[0], model[2]):
            module.zero_grad()
    with opt.worker(0):
        backward(model, 2)
    opt.step()
    opt.zero_grad()
    iterate(model, opt, 2, 3)
    opt.step()
    for grad, value in zip(kept, values, strict=True):
        assert torch.equal(grad, value)
    opt.close()
