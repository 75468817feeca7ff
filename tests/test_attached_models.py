"""Attached models: copies in their state_dicts are not silently the weights, and their `zero_grad()` is complete."""

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
import time
import types
import weakref

import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")


class Tied(torch.nn.Module):
    """A parameter with two names in two modules, and one with two names in one module."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(4, 4)
        self.decoder = torch.nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.decoder.twin = self.decoder.bias
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def attached(world, dtype=torch.float32, model=None, **options):
    torch.manual_seed(0)
    model = (Tied() if model is None else model).to(dtype)
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.1, world=world, **options)
    opt.attach(model)
    backward(opt, model)
    opt.step()
    opt.zero_grad()
    return opt, model


def backward(opt, model, workers=None):
    first = next(model.parameters())
    for v in range(opt.world.workers) if workers is None else workers:
        with opt.worker(v):
            model(torch.full((1, 4), 1.0 + v, dtype=first.dtype)).sum().backward()


def is_odd(world):
    return world.rank == world.size - 1


# -- state_dict ------------------------------------------------------------------------------------------------------

WRITES = {
    "copy": lambda tensor: tensor.copy_(torch.ones_like(tensor)),
    "a part": lambda tensor: tensor.view(-1)[:1].zero_(),
    "in place": lambda tensor: tensor.__imul__(2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES)
def test_writing_into_a_state_dict_on_one_rank_is_an_error_on_all(team, write, dtype):
    opt, model = attached(team, dtype)
    before = opt.master(0)
    state = model.state_dict()
    if is_odd(team):
        WRITES[write](state["encoder.bias"])
    backward(opt, model)
    with pytest.raises(
        xc.UsageError, match=r"'encoder\.bias' from model\.state_dict\(\) was written.*write=True"
    ):
        opt.step()
    assert torch.equal(opt.master(0), before)
    del state
    opt.step()
    opt.close()


def test_older_state_dicts_are_remembered_as_long_as_they_live(world):
    opt, model = attached(world)
    old, new = model.state_dict(), model.state_dict()
    old["decoder.bias"].zero_()
    backward(opt, model)
    with pytest.raises(xc.UsageError, match="was written"):
        opt.step()
    del old
    opt.step()
    new["encoder.weight"].zero_()
    with pytest.raises(xc.UsageError, match="was written"):
        opt.step()
    opt.close()


MEANT = {
    "loaded": lambda opt, model, state: model.load_state_dict(state),
    "adopted": lambda opt, model, state: opt.adopt(),
    "clone": lambda opt, model, state: None,
    "dropped": lambda opt, model, state: state.clear(),
}


@pytest.mark.parametrize("how", MEANT)
def test_writes_that_are_meant_are_no_error(team, how):
    opt, model = attached(team)
    state = model.state_dict()
    target = {k: v.clone() for k, v in state.items()} if how == "clone" else state
    target["encoder.bias"].fill_(3.0)
    MEANT[how](opt, model, state)
    if how == "loaded":
        assert model.encoder.bias.tolist() == [3.0] * 4
    backward(opt, model)
    opt.step()
    opt.close()


def test_buffers_and_unwritten_dicts_are_no_error(team):
    opt, model = attached(team)
    kept = [model.state_dict() for _ in range(3)]
    saved = io.BytesIO()
    torch.save(kept[0], saved)
    kept.append(copy.deepcopy(kept[0]))
    kept[-1]["encoder.bias"].zero_()
    kept[0]["count"].add_(1)  # a buffer is the model's own
    assert model.count.tolist() == [1.0, 1.0]
    for _ in range(3):
        opt.zero_grad()
        backward(opt, model)
        opt.step()
    opt.close()


def test_dicts_of_closed_and_shown_optimizers_are_the_models_own(world):
    opt, model = attached(world)
    with opt.master_weights(write=True):
        model.state_dict()["encoder.bias"].fill_(2.0)
    assert opt.master(1).tolist() == [2.0] * 4
    opt.close()
    model.state_dict()["encoder.bias"].fill_(3.0)
    assert model.encoder.bias.tolist() == [3.0] * 4


def test_keep_vars_gives_the_parameters(team):
    opt, model = attached(team)
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is param for name, param in model.named_parameters(remove_duplicate=False))
    opt.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_weights_are_one_tensor_under_all_their_names(team, dtype):
    opt, model = attached(team, dtype)
    for _ in range(2):
        state = model.state_dict()
        assert state["encoder.weight"] is state["decoder.weight"]
        assert state["decoder.bias"] is state["decoder.twin"]
        assert state["encoder.bias"] is not state["decoder.bias"]
        assert torch.equal(state["decoder.weight"], opt.master(0).to(dtype))
        backward(opt, model)
        opt.step()
    again = model.state_dict(destination=state)
    assert torch.equal(again["decoder.weight"], opt.master(0).to(dtype))
    assert model.decoder.state_dict()["weight"] is not again["decoder.weight"]
    opt.close()


# -- zero_grad -------------------------------------------------------------------------------------------------------

NETS = {
    "tied": Tied,
    "nested": lambda: torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4)),
}


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
@pytest.mark.parametrize("set_to_none", [None, True, False])
@pytest.mark.parametrize("net", NETS)
def test_zeroing_a_model_forgets_the_gradients_of_all_workers(team, net, set_to_none, gradients):
    opt, model = attached(team, model=NETS[net](), gradients=gradients)
    before = [opt.master(i) for i in range(len(list(model.parameters())))]
    backward(opt, model)
    model.zero_grad(*([] if set_to_none is None else [set_to_none]))
    for p in model.parameters():
        assert p.grad is None if set_to_none in (None, True) else not p.grad.any()
    opt.step()
    assert all(torch.equal(opt.master(i), before[i]) for i in range(len(before)))
    opt.close()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_a_model_starts_the_count_of_micro_batches_again(team, set_to_none):
    opt, model = attached(team)
    opt_b, model_b = attached(team)
    for optimizer, network, aborted in ((opt, model, True), (opt_b, model_b, False)):
        if aborted:
            with optimizer.no_sync():
                backward(optimizer, network)
            network.zero_grad(set_to_none=set_to_none)
        backward(optimizer, network)
        optimizer.step()
    assert torch.equal(opt.master(0), opt_b.master(0))
    opt.close()
    opt_b.close()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_a_part_keeps_the_gradients_of_the_rest(team, set_to_none):
    opt, model = attached(team, model=NETS["nested"]())
    before = [opt.master(i) for i in range(4)]
    backward(opt, model)
    model[0].zero_grad(set_to_none)
    assert model[1].weight.grad is not None
    opt.step()
    assert [torch.equal(opt.master(i), before[i]) for i in range(4)] == [True, True, False, False]
    opt.close()


def test_parameters_of_others_are_zeroed_as_usual(world):
    model = NETS["nested"]()
    opt = xc.SGD(model[0].parameters(), lr=0.1, world=world)
    opt.attach(model)
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    assert [p.grad for p in model.parameters()] == [None] * 4
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in model.parameters())
    opt.close()


def test_one_model_may_have_two_optimizers_and_one_optimizer_two_models(team):
    model = NETS["nested"]()
    first, second = (xc.SGD(part.parameters(), lr=0.1, world=team) for part in model)
    first.attach(model)
    second.attach(model)
    for v in range(team.workers):
        with first.worker(v), second.worker(v):
            model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    before = first.master(0), second.master(0)
    first.step()
    second.step()
    assert torch.equal(first.master(0), before[0]) and torch.equal(second.master(0), before[1])
    first.close()
    second.close()

    left, right = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    opt = xc.SGD([*left.parameters(), *right.parameters()], lr=0.1, world=team)
    opt.attach(left)
    opt.attach(right)
    before = [opt.master(i) for i in range(4)]
    for v in range(team.workers):
        with opt.worker(v):
            (left(torch.ones(1, 4)) + right(torch.ones(1, 4))).sum().backward()
    left.zero_grad()
    opt.step()
    assert [torch.equal(opt.master(i), before[i]) for i in range(4)] == [True, True, False, False]
    opt.close()


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, saved_and_loaded])
def test_zeroing_a_copy_leaves_the_model_and_its_optimizer_alone(world, copied):
    opt, model = attached(world)
    other = copied(model)
    backward(opt, model)
    other(torch.ones(1, 4)).sum().backward()
    other.zero_grad()
    other.encoder.zero_grad(set_to_none=False)
    assert all(p.grad is None for p in other.parameters())
    assert all(p.grad is not None for p in model.parameters())
    before = opt.master(0)
    opt.step()
    assert not torch.equal(opt.master(0), before)
    again = copied(other)
    again(torch.ones(1, 4)).sum().backward()
    again.zero_grad()
    assert all(p.grad is None for p in again.parameters())
    opt.close()


def test_zeroing_goes_on_without_the_optimizer(world):
    opt, model = attached(world)
    opt.close()
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt, model = attached(world)
    kept = weakref.ref(opt)
    del opt
    gc.collect()
    assert kept() is None
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    kept = weakref.ref(model)
    del model
    assert kept() is None  # no cycle that only the garbage collector could free


class Counting(torch.nn.Linear):
    """Has a `zero_grad` of its own."""

    calls = 0

    def zero_grad(self, set_to_none=True):
        type(self).calls += 1
        super().zero_grad(set_to_none)


def test_zero_grad_of_the_users_own_is_still_called(world):
    model = Counting(4, 4)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    opt.attach(model)
    before, called = Counting.calls, []
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    assert Counting.calls == before + 1 and model.weight.grad is None
    opt.close()
    plain = torch.nn.Linear(4, 4)
    plain.zero_grad = lambda set_to_none=True: called.append(set_to_none)
    opt = xc.SGD(plain.parameters(), lr=0.1, world=world)
    opt.attach(plain)
    plain.zero_grad(set_to_none=False)
    assert called == [False]
    opt.close()


def test_attached_models_can_be_traced_and_scripted(world):
    opt, model = attached(world, model=NETS["nested"]())
    x = torch.ones(1, 4)
    for other in (torch.jit.script(model), torch.fx.symbolic_trace(model), torch.jit.trace(model, x)):
        assert torch.equal(other(x), model(x))
    opt.close()


def test_modules_that_are_added_or_wrapped_after_attaching_save_the_master_weights(world):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    opt = xc.ExtrapSGD(model.parameters(), lr=0.5, inner_lr=0.25, world=world)
    opt.attach(model)
    model.append(torch.nn.Linear(2, 2))
    opt.add_param_group({"params": list(model[2].parameters())})
    torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(2, 2))
    model[1] = torch.nn.Sequential(model[1], torch.nn.Identity())
    model(torch.ones(2, 3)).square().sum().backward()
    opt.step()
    saved = model.state_dict()
    for name, param in model.named_parameters():
        assert torch.equal(saved[name], opt.master(opt._binding.index[id(param)])), name
    opt.close()


class OwnZeroGrad(torch.nn.Linear):
    def zero_grad(self):
        super().zero_grad()


class KeywordZeroGrad(torch.nn.Linear):
    def zero_grad(self, *, set_to_none=True):
        super().zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("kind", [OwnZeroGrad, KeywordZeroGrad])
def test_zero_grad_of_a_model_keeps_its_own_signature(world, kind):
    model = kind(3, 2)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    model(torch.ones(1, 3)).sum().backward()
    model.zero_grad()
    assert model.weight.grad is None
    if kind is KeywordZeroGrad:
        model(torch.ones(1, 3)).sum().backward()
        model.zero_grad(set_to_none=False)
        assert not model.weight.grad.any()
    opt.close()
    model.zero_grad()


# -- Modules that save themselves in their own way ------------------------------------------------------------------


class Own(torch.nn.Linear):
    """Saves what it has, and what it computes from it, under names of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "kernel"] = self.weight.detach()
        destination[prefix + "first row"] = self.weight.detach()[0]
        destination[prefix + "transposed"] = self.weight.data.t()
        destination[prefix + "doubled"] = 2 * self.weight.detach()
        destination[prefix + "nested"] = {"bias": [self.bias.detach(), 3]}


class Extra(torch.nn.Linear):
    """Has an extra state that it computes from its weights."""

    fails = False

    def get_extra_state(self):
        if self.fails:
            raise ZeroDivisionError
        return {"sum": self.weight.detach().double().sum(), "bias": self.bias.detach()}

    def set_extra_state(self, state):
        pass


def in_a_model(kind):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Tanh(), kind(4, 3)))


def test_modules_that_save_themselves_under_other_names_save_the_master_weights(team):
    opt, model = attached(team, model=in_a_model(Own))
    weight, bias = opt.master(2), opt.master(3)
    before = [p.detach().clone() for p in model.parameters()]
    state = model.state_dict()
    assert torch.equal(state["1.1.kernel"], weight)
    assert torch.equal(state["1.1.first row"], weight[0])
    assert torch.equal(state["1.1.transposed"], weight.t())
    assert torch.equal(state["1.1.doubled"], 2 * weight)
    assert torch.equal(state["1.1.nested"]["bias"][0], bias)
    assert state["1.1.nested"]["bias"][1] == 3
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    backward(opt, model)
    opt.step()
    assert torch.equal(state["1.1.kernel"], weight)  # it is a copy
    state["1.1.nested"]["bias"][0].zero_()
    with pytest.raises(xc.UsageError, match="is a copy of the master weights"):
        opt.step()
    opt.close()


def test_extra_state_is_of_the_master_weights(team):
    opt, model = attached(team, model=in_a_model(Extra))
    for v in range(team.workers):
        with opt.worker(v):
            extra = model.state_dict()["1.1._extra_state"]
            assert extra["sum"] == opt.master(2).double().sum()
            assert torch.equal(extra["bias"], opt.master(3))
            assert torch.equal(model[1].state_dict()["1._extra_state"]["bias"], opt.master(3))
    opt.close()


def test_a_state_dict_that_fails_leaves_the_workers_weights(team):
    opt, model = attached(team, model=in_a_model(Extra))
    before = [p.detach().clone() for p in model.parameters()]
    model[1][1].fails = True
    with pytest.raises(ZeroDivisionError):
        model.state_dict()
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
    backward(opt, model)
    opt.step()
    opt.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_rename_and_compute_see_the_master_weights(team, when):
    def rename(module, state, prefix, _):
        state[prefix + "kernel"] = state.pop(prefix + "weight")
        state[prefix + "scale"] = module.weight.detach().abs().max()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    if when == "before":
        model[0]._register_state_dict_hook(rename)
    opt, model = attached(team, model=model)
    if when == "after":
        model[0]._register_state_dict_hook(rename)
    state = model.state_dict()
    assert sorted(state) == ["0.bias", "0.kernel", "0.scale"]
    assert torch.equal(state["0.kernel"], opt.master(0))
    assert state["0.scale"] == opt.master(0).abs().max()
    opt.close()


def test_saving_between_forward_and_backward_does_no_harm(team):
    opt, model = attached(team)
    loss = model(torch.ones(1, 4)).sum()
    model.state_dict()
    loss.backward()
    opt.step()
    opt.close()


def test_a_module_that_is_wrapped_later_saves_the_master_weights(team):
    opt, model = attached(team, model=in_a_model(Own))
    assert torch.equal(torch.nn.Sequential(model).state_dict()["0.1.1.doubled"], 2 * opt.master(2))
    opt.close()


def test_saved_parameters_themselves_stay_parameters(team):
    opt, model = attached(team)
    state = model.state_dict(keep_vars=True)
    assert state["encoder.weight"] is model.encoder.weight
    opt.close()


# -- Copies of attached models --------------------------------------------------------------------------------------


def test_a_shallow_copy_acts_on_the_model_that_it_copies(world):
    opt, model = attached(world)
    other = copy.copy(model)
    backward(opt, model)
    other.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(other.state_dict()["encoder.bias"], opt.master(1))
    opt.close()


def test_a_shallow_copy_of_a_model_that_is_gone_must_be_attached(world):
    opt, model = attached(world)
    model = copy.copy(model)
    gc.collect()
    for call in (model.zero_grad, model.state_dict, lambda: pickle.dumps(model)):
        with pytest.raises(xc.UsageError, match=r"attach\(copy\)"):
            call()
    opt.attach(model)
    backward(opt, model)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.state_dict()["encoder.bias"], opt.master(1))
    opt.close()


def test_a_saved_model_is_loaded_without_this_library(world, tmp_path):
    opt, model = attached(world, model=torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()))
    with opt.master_weights():
        torch.save(model, tmp_path / "model.pt")
        wanted = model(torch.ones(1, 4)).tolist()
    opt.close()
    script = (
        "import sys, torch; sys.modules['extrapcomm'] = None\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "out = model(torch.ones(1, 4)); out.sum().backward(); model.zero_grad()\n"
        "assert all(p.grad is None for p in model.parameters())\n"
        "model.load_state_dict(model.state_dict())\n"
        "print(out.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(wanted), done.stderr


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_method_that_the_user_put_there_is_kept_in_copies(world, copied):
    model = torch.nn.Linear(4, 4)
    model.zero_grad = noted
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    other = copied(model)
    assert other.zero_grad is noted
    opt.close()


def noted(*_, **__):
    """What a user has put in place of `zero_grad`."""


# -- Parameters that are exchanged ----------------------------------------------------------------------------------


def test_loading_by_exchanging_the_parameters_is_refused(world):
    opt, model = attached(world)
    state = model.state_dict()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(xc.UsageError, match="set_swap_module_params_on_conversion"):
            model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    backward(opt, model)
    opt.step()
    opt.close()


def test_parameters_that_were_exchanged_are_not_adopted(world):
    param = torch.nn.Parameter(torch.ones(4))
    opt = xc.SGD([param], lr=0.1, world=world)
    opt.zero_grad()
    torch.utils.swap_tensors(param, torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(xc.UsageError, match="exchanged"):
        opt.adopt()
    opt.close()


# -- Weights that torch keeps for several workers -------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_cached_parametrizations_are_computed_anew_for_each_worker(worlds):
    world, parametrize = worlds(2), torch.nn.utils.parametrize
    model = torch.nn.Linear(4, 1, bias=False)
    parametrize.register_parametrization(model, "weight", Scaled())
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.5, world=world)
    for v in range(2):
        with opt.worker(v):
            model(torch.full((1, 4), 1.0 + v)).sum().backward()
    opt.step()
    with parametrize.cached():
        seen = []
        for v in range(2):
            with opt.worker(v):
                seen.append(model.weight.detach().clone())
                assert torch.equal(seen[v], 2 * model.parametrizations.weight.original)
        assert not torch.equal(*seen)
        with opt.master_weights():
            assert torch.equal(model.weight, 2 * opt.master(0))
        assert torch.equal(model.weight, seen[0])
    opt.close()


# -- What a state_dict has is the module's own ----------------------------------------------------------------------


class Doubled(torch.nn.Linear):
    """Saves another value under its parameter's own name."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = 2 * destination[prefix + "weight"]
        destination[prefix + "kernel"] = self.weight


class Box:
    """Holds something."""

    def __init__(self, value):
        self.value = value


class Boxes(dict):
    """Torch does not know this one."""


class Opaque(torch.nn.Linear):
    """Has its weights in containers that torch does not look into."""

    def get_extra_state(self):
        weight = self.weight.detach()
        return {
            "array": weight.numpy(),
            "mapping": Boxes(weight=weight),
            "box": Box(weight),
            "param": self.weight,
        }

    def set_extra_state(self, state):
        pass


def test_a_modules_own_values_stay(world):
    opt, model = attached(world, model=in_a_model(Doubled))
    for state, key in (
        (model.state_dict(), "1.1."),
        (model[1].state_dict(), "1."),
        (model[1][1].state_dict(), ""),
    ):
        assert torch.equal(state[key + "weight"], 2 * opt.master(2))
        assert torch.equal(state[key + "kernel"], opt.master(2))
    opt.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hooks_own_values_stay(world, when):
    def to_half(module, state, prefix, _):
        state[prefix + "weight"] = state[prefix + "weight"].half()

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    if when == "before":
        model[0].register_state_dict_post_hook(to_half)
    opt, model = attached(world, model=model)
    if when == "after":
        model[0].register_state_dict_post_hook(to_half)
    assert torch.equal(model.state_dict()["0.weight"], opt.master(0).half())
    opt.close()


def test_what_torch_cannot_look_into_is_of_the_master_weights(world):
    opt, model = attached(world, model=in_a_model(Opaque))
    extra = model.state_dict()["1.1._extra_state"]
    weight = opt.master(2)
    assert torch.equal(torch.from_numpy(extra["array"]), weight)
    assert torch.equal(extra["mapping"]["weight"], weight)
    assert torch.equal(extra["box"].value, weight)
    assert torch.equal(extra["param"], weight)
    opt.close()


def test_a_state_dict_of_master_weights_is_a_copy(world):
    opt, model = attached(world)
    with opt.master_weights():
        state = model.state_dict()
    assert torch.equal(state["encoder.bias"], opt.master(1))
    opt.close()


def test_a_module_that_shows_the_master_weights_itself_may_be_attached(world):
    class Showing(torch.nn.Linear):
        def state_dict(self, *args, **kwargs):
            with self.__dict__["optimizer"]().master_weights():
                return super().state_dict(*args, **kwargs)

    model = Showing(4, 4)
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.1, world=world)
    model.__dict__["optimizer"] = weakref.ref(opt)
    opt.attach(model)
    backward(opt, model)
    opt.step()
    before = model.weight.detach().clone()
    assert torch.equal(model.state_dict()["weight"], opt.master(0))
    assert torch.equal(model.weight, before)
    backward(opt, model)
    opt.step()
    opt.close()


@pytest.mark.parametrize("call", ["step", "adopt"])
def test_a_step_while_a_state_dict_is_made_is_refused(world, call):
    opt, model = attached(world, model=torch.nn.Sequential(torch.nn.Linear(4, 4)))
    model.register_state_dict_post_hook(lambda *_: getattr(opt, call)())
    with pytest.raises(xc.UsageError, match=r"inside state_dict\(\)"):
        model.state_dict()
    opt.close()


def test_plain_models_are_saved_without_touching_the_weights(world):
    """Another thread may train meanwhile."""
    opt, model = attached(world, model=torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
    seen = []
    before = [p.detach().clone() for p in model.parameters()]
    real = type(opt)._can_show_for

    def watch(self, module):
        seen.append(real(self, module))
        return seen[-1]

    type(opt)._can_show_for = watch
    try:
        model.state_dict()
    finally:
        type(opt)._can_show_for = real
    assert seen == [False]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    opt.close()


def test_cached_weights_are_not_those_of_saving(world):
    class Extra2(torch.nn.Linear):
        def get_extra_state(self):
            return self.weight.detach().clone()

        def set_extra_state(self, state):
            pass

    parametrize = torch.nn.utils.parametrize
    model = Extra2(4, 1, bias=False)
    parametrize.register_parametrization(model, "weight", Scaled())
    opt, model = attached(world, model=model)
    with parametrize.cached():
        shown = model.weight.detach().clone()
        assert torch.equal(model.state_dict()["_extra_state"], 2 * opt.master(0))
        assert torch.equal(model.weight, shown)
    opt.close()


def test_a_module_that_was_added_after_attach_saves_the_master_weights(world):
    opt, model = attached(world)
    model.more = torch.nn.Linear(4, 4)
    opt.add_param_group({"params": model.more.parameters()})
    for v in range(world.workers):
        with opt.worker(v):
            model.more(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert torch.equal(model.more.state_dict()["bias"], opt.master(len(opt.state) - 1))
    opt.close()


def test_saving_many_small_parameters_takes_no_square_of_their_number(world):
    def block(depth):
        inner = [torch.nn.Linear(1, 1) for _ in range(3)]
        return torch.nn.Sequential(*inner, *[block(depth - 1) for _ in range(2 if depth else 0)])

    def seconds(model):
        start = time.perf_counter()
        assert len(model.state_dict()) == 1530
        return time.perf_counter() - start

    model, plain = block(7), block(7)
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    times = [(seconds(model), seconds(plain)) for _ in range(5)]
    ours, theirs = map(min, zip(*times, strict=True))
    assert ours < 60 * theirs  # 10 times; a square took 230 times
    opt.close()


# -- zero_grad() of parts, in worker(), and of the user's own ------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_zeroing_all_parts_one_by_one_starts_the_count_again(worlds, set_to_none, workers):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    opt = xc.SGD([*first.parameters(), *second.parameters()], lr=1.0, world=worlds(workers))
    opt.attach(first)
    opt.attach(second)

    def run():
        for v in range(workers):
            with opt.worker(v):
                second(first(torch.ones(1, 3))).sum().backward()

    with opt.no_sync():
        run()
    first.zero_grad(set_to_none)
    second.zero_grad(set_to_none)
    before = opt.master(3)
    run()
    grad = second.bias.grad.clone()
    opt.step()
    torch.testing.assert_close(before - opt.master(3), grad)
    opt.close()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_within_worker_keeps_the_other_workers_gradients(worlds, set_to_none):
    results = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)
        opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(2))
        if attach:
            opt.attach(model)
        for _ in range(2):
            for v in range(2):
                with opt.worker(v):
                    model.zero_grad(set_to_none)
                    model(torch.full((2, 3), 1.0 + v)).square().mean().backward()
            opt.step()
        results.append(opt.master(0))
        opt.close()
    assert torch.equal(*results)


class LooksFirst(torch.nn.Linear):
    """Its `zero_grad` looks at the gradients, and keeps that of the bias."""

    def zero_grad(self, set_to_none=True):
        self.norm = self.weight.grad.norm()
        self.weight.grad = None


def test_a_zero_grad_of_the_users_own_decides_what_goes(worlds):
    model = LooksFirst(3, 2)
    opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(2))
    opt.attach(model)
    for v in range(2):
        with opt.worker(v):
            model(torch.ones(1, 3)).sum().backward()
    model.zero_grad()
    assert model.norm > 0
    for v in range(2):
        with opt.worker(v):
            assert model.weight.grad is None and model.bias.grad is not None
    opt.close()


# -- Modules that pickle themselves, or take no hooks ---------------------------------------------------------------


def test_traced_graphs_are_pickled_and_copied(world):
    model = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    opt, model = attached(world, model=model)
    weight = opt.master(0)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        other.zero_grad()
        assert sorted(other.state_dict()) == ["0.bias", "0.weight"]
    assert torch.equal(model.state_dict()["0.weight"], weight)
    opt.close()


def test_a_closed_optimizer_leaves_no_methods_in_the_model(world):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.zero_grad = noted
    opt, model = attached(world, model=model)
    opt.close()
    assert model.zero_grad is noted and "state_dict" not in model.__dict__
    assert "zero_grad" not in model[0].__dict__


def test_scripted_modules_are_refused_before_anything_is_hooked(world):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.jit.script(torch.nn.Linear(4, 4)))
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    with pytest.raises(xc.UsageError, match="scripted"):
        opt.attach(model)
    assert not model._state_dict_hooks and not model[0]._state_dict_hooks
    opt.close()


# -- Whatever way a module saves itself -----------------------------------------------------------------------------


def replaced_on_the_instance(net):
    own = net.state_dict
    net.state_dict = lambda *args, **kwargs: {
        name: value.double() for name, value in own(*args, **kwargs).items()
    }
    return lambda state: state["0.weight"]


def saver_on_the_instance(net):
    layer = net[0]
    layer._save_to_state_dict = lambda state, prefix, keep: state.update(
        {prefix + "x": layer.weight.detach() * 2}
    )
    return lambda state: state["0.x"] / 2


class InATuple(torch.nn.Sequential):
    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs), 3


class ReadOnly(torch.nn.Sequential):
    def state_dict(self, *args, **kwargs):
        return types.MappingProxyType(super().state_dict(*args, **kwargs))


class View(torch.nn.Sequential):
    """Its extra state cannot be copied: it holds a view with a graph."""

    def get_extra_state(self):
        return Box(self[0].weight[:])

    def set_extra_state(self, state):
        pass


WAYS = {
    "state_dict of the instance": (torch.nn.Sequential, replaced_on_the_instance),
    "_save_to_state_dict of the instance": (torch.nn.Sequential, saver_on_the_instance),
    "a tuple": (InATuple, lambda net: lambda state: state[0]["0.weight"]),
    "a read-only mapping": (ReadOnly, lambda net: lambda state: state["0.weight"]),
    "a view in an object": (View, lambda net: lambda state: state["_extra_state"].value),
}


@pytest.mark.parametrize("within", [False, True], ids=["", "master_weights"])
@pytest.mark.parametrize("way", WAYS)
def test_any_way_to_save_gives_the_master_weights(world, way, within):
    kind, prepare = WAYS[way]
    torch.manual_seed(0)
    model = kind(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    found = prepare(model)
    opt, model = attached(world, model=model)
    with opt.master_weights() if within else contextlib.nullcontext():
        state = model.state_dict()
    torch.testing.assert_close(found(state).float(), opt.master(0))
    opt.close()


def test_a_users_hook_that_keeps_the_entries_keeps_copies(world):
    kept = {}
    opt, model = attached(world, model=torch.nn.Sequential(torch.nn.Linear(4, 4)))
    model.register_state_dict_post_hook(lambda module, state, prefix, _: kept.update(state))
    model.state_dict()
    assert torch.equal(kept["0.weight"], opt.master(0))
    opt.close()


def test_a_module_that_pickles_and_computes_itself_is_saved_in_master_weights(world):
    class Reduced(torch.nn.Sequential):
        def __reduce__(self):
            return Reduced, ()

        def get_extra_state(self):
            return self[0].weight.detach() * 2

        def set_extra_state(self, state):
            pass

    opt, model = attached(world, model=Reduced(torch.nn.Linear(4, 4)))
    with pytest.raises(xc.UsageError, match="inside opt.master_weights"):
        model.state_dict()
    with opt.master_weights():
        assert torch.equal(model.state_dict()["_extra_state"], 2 * opt.master(0))
    opt.close()


def test_parameters_without_elements_do_not_hide_the_others(world):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].empty = torch.nn.Parameter(torch.zeros(0, 3))
    opt, model = attached(world, model=model)
    state = model.state_dict()
    for i, name in enumerate(dict(model.named_parameters())):
        assert torch.equal(state[name], opt.master(i)), name
    opt.close()


class Versioned(torch.nn.Linear):
    """Loads what was saved before its version 2 transposed."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Nested(torch.nn.Sequential):
    def state_dict(self, *args, **kwargs):
        return {"model": super().state_dict(*args, **kwargs)}

    def get_extra_state(self):
        cyclic = {}
        cyclic["itself"] = cyclic
        return cyclic

    def set_extra_state(self, state):
        pass


def test_nested_state_dicts_keep_their_versions(world):
    opt, model = attached(world, model=Nested(Versioned(4, 4)))
    state = model.state_dict()["model"]
    other = torch.nn.Sequential(Versioned(4, 4))
    state.pop("_extra_state")
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, opt.master(0))
    opt.close()


class Complex(torch.nn.Module):
    """Saves lazily conjugated and negated looks, and a part."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(8.0).reshape(4, 2))

    def forward(self, x):
        return x @ self.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        conjugated = torch.view_as_complex(self.weight.detach()).conj()
        destination[prefix + "conjugated"] = conjugated
        destination[prefix + "imaginary"] = conjugated.imag
        destination[prefix + "row"] = self.weight.detach()[1]


def test_lazy_looks_and_parts_are_saved_as_they_are(world):
    opt, model = attached(world, model=Complex())
    state, weight = model.state_dict(), opt.master(0)
    assert torch.equal(state["conjugated"], torch.view_as_complex(weight).conj())
    assert torch.equal(state["imaginary"], -weight[:, 1])
    assert torch.equal(state["row"], weight[1]) and state["row"].untyped_storage().nbytes() == 8
    opt.close()


def test_writing_into_a_state_dict_between_a_load_and_the_step_is_an_error(world):
    opt, model = attached(world)
    model.load_state_dict(model.state_dict())
    state = model.state_dict()
    state["encoder.bias"].fill_(3.0)
    with pytest.raises(xc.UsageError, match="was written"):
        opt.step()
    opt.adopt()
    opt.step()
    opt.close()


@pytest.mark.parametrize("kind", [xc.SGD, xc.ExtrapSGD])
@pytest.mark.parametrize("pending", [False, True], ids=["", "loaded before"])
def test_master_weights_may_be_asked_for_while_saving(world, kind, pending):
    class Asks(torch.nn.Linear):
        def get_extra_state(self):
            with self.__dict__["optimizer"]().master_weights():
                return self.weight.sum().item()

        def set_extra_state(self, state):
            pass

    model = Asks(4, 4)
    opt = kind(model.parameters(), lr=0.1, world=world)
    model.__dict__["optimizer"] = weakref.ref(opt)
    opt.attach(model)
    backward(opt, model)
    opt.step()
    if pending:
        model.load_state_dict(model.state_dict())
    assert model.state_dict()["_extra_state"] == pytest.approx(opt.master(0).sum().item())
    opt.close()


# -- Gradients of others stay ---------------------------------------------------------------------------------------


def test_zeroing_a_part_leaves_the_zeros_of_the_others(worlds):
    results = []
    for optimizer in (torch.optim.SGD, xc.SGD):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
        options = {} if optimizer is torch.optim.SGD else {"world": worlds(1)}
        opt = optimizer(model.parameters(), lr=0.1, momentum=0.9, **options)
        if options:
            opt.attach(model)
        model(torch.ones(1, 4)).sum().backward()
        opt.step()
        model[0].zero_grad(set_to_none=False)
        model[1].zero_grad()
        opt.step()
        assert [p.grad is None for p in model.parameters()] == [False, False, True, True]
        results.append([p.detach().clone() for p in model.parameters()])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class Experts(torch.nn.ModuleList):
    """Each worker uses another expert; the `zero_grad` is the user's own, and its argument is no `set_to_none`."""

    def zero_grad(self, verbose=True):
        super().zero_grad()


def test_a_zero_grad_of_the_users_own_reaches_what_only_other_workers_used(worlds):
    model = Experts([torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)])
    opt = xc.SGD(model.parameters(), lr=0.1, world=worlds(2))
    opt.attach(model)
    for _ in range(3):
        model.zero_grad(False)
        before = [opt.master(i) for i in range(2)]
        for v in range(2):
            with opt.worker(v):
                model[v](torch.ones(1, 2)).sum().backward()
        opt.step()
        for i in range(2):
            torch.testing.assert_close(before[i] - opt.master(i), torch.full((1, 2), 0.05))
    opt.close()


def test_a_group_is_added_although_an_attached_model_has_lost_its_parameters(world):
    model = torch.nn.Linear(2, 1)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    del model.weight, model.bias
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert len(opt.param_groups) == 2
    opt.close()


def test_a_parent_that_ignores_a_hooks_new_dict_saves_the_master_weights(world):
    """torch goes on with the dict that it gave to the part, whatever that part returns."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    parent = torch.nn.Sequential(model)
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=5.0, world=world)
    opt.attach(model)
    model[0]._register_state_dict_hook(lambda module, state, prefix, metadata: dict(state))
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    for saved in (parent.state_dict()["0.0.weight"], model.state_dict()["0.weight"]):
        torch.testing.assert_close(saved, opt.master(0))
        assert saved.data_ptr() != model[0].weight.data_ptr()
    opt.close()


@pytest.mark.parametrize("how", ["counted", "uncounted"])
def test_loading_a_part_after_a_write_keeps_the_other_layers(world, how):
    """Those that nobody wrote or loaded go on from the master weights, although the model showed displaced ones."""
    opt, model = attached(world)
    before = [opt.master(i) for i in range(len(list(model.parameters())))]
    names = [name for name, _ in model.named_parameters()]
    written, loaded = model.encoder.bias, names.index("encoder.weight")
    if how == "counted":
        with torch.no_grad():
            written.fill_(2.0)
    else:
        written.data.fill_(2.0)
    model.encoder.load_state_dict({"weight": torch.eye(4)}, strict=False)
    opt.adopt()
    for i, (name, was) in enumerate(zip(names, before, strict=True)):
        if i == loaded:
            assert torch.equal(opt.master(i), torch.eye(4))
        elif name == "encoder.bias":
            assert torch.equal(opt.master(i), torch.full((4,), 2.0))
        else:
            assert torch.equal(opt.master(i), was), name
    opt.close()


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_no_hook_stays_behind(world, gradients, end):
    """Those on modules of an optimizer that was dropped go when the next one attaches itself."""
    model = Tied()
    for _ in range(3):
        opt = xc.SGD(model.parameters(), lr=0.1, world=world, gradients=gradients)
        opt.attach(model)
        backward(opt, model)
        opt.step()
        opt.zero_grad()
        if end == "closed":
            opt.close()
        del opt
        gc.collect()
    if end == "dropped":
        assert all(len(module._state_dict_hooks) == 1 for module in model.modules())
        opt = xc.SGD(model.parameters(), lr=0.1, world=world)
        opt.attach(model)
        opt.close()
    for module in model.modules():
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks
    for param in model.parameters():
        assert not param._backward_hooks and not getattr(param, "_post_accumulate_grad_hooks", None)


class Levels(torch.nn.Module):
    """Modules in modules, each with parameters of its own."""

    def __init__(self, depth):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))
        self.b = torch.nn.Parameter(torch.zeros(3))
        if depth > 1:
            self.inner = Levels(depth - 1)


def levels(world, depth):
    model = Levels(depth)
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.1, world=world)
    opt.attach(model)
    for p in model.parameters():
        p.grad = torch.ones(3)
    opt.step()
    return model, opt


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_modules_in_modules_are_loaded_whole(world, depth):
    model, opt = levels(world, depth)
    for turn in range(2):
        wanted = {name: torch.full((3,), 7.0 + i + turn) for i, name in enumerate(model.state_dict())}
        model.load_state_dict(wanted)
        for name, param in model.named_parameters():
            assert torch.equal(param.detach(), wanted[name]), name
        for p in model.parameters():
            p.grad = torch.zeros(3)
        opt.step()
        for i, name in enumerate(wanted):
            assert torch.equal(opt.master(i), wanted[name]), name
    opt.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("how", ["counted", "uncounted"])
def test_a_write_before_a_load_stays_where_nothing_is_loaded(world, depth, how):
    model, opt = levels(world, depth)
    if how == "counted":
        with torch.no_grad():
            model.b.fill_(5.0)
    else:
        model.b.data.fill_(5.0)
    given = {name: torch.full((3,), 7.0) for name in model.state_dict() if name != "b"}
    model.load_state_dict(given, strict=False)
    opt.adopt()
    for i, (name, _) in enumerate(model.named_parameters()):
        assert torch.equal(opt.master(i), torch.full((3,), 5.0 if name == "b" else 7.0)), name
    opt.close()


def test_a_write_before_a_load_that_fails_is_still_refused(world):
    model, opt = levels(world, 3)
    with torch.no_grad():
        model.b.fill_(5.0)

    def fail(*_):
        raise ValueError("of the user's own")

    hook = model.inner.register_load_state_dict_pre_hook(fail)
    with pytest.raises(ValueError, match="of the user's own"):
        model.load_state_dict({name: torch.zeros(3) for name, _ in model.named_parameters()})
    hook.remove()
    with pytest.raises(xc.UsageError, match="was written"):
        opt.step()
    opt.close()


def test_an_optimizer_may_be_collected_while_a_model_loads(world):
    model = Tied()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropped = xc.SGD(model.parameters(), lr=0.1, world=world)
    dropped.attach(model)
    for module in (model.encoder, model.decoder):
        module.register_load_state_dict_pre_hook(lambda *_: (gc.collect(), None)[1])
        module.register_load_state_dict_post_hook(lambda *_: (gc.collect(), None)[1])
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    gc.disable()
    try:
        del dropped
        model.load_state_dict(saved)
    finally:
        gc.enable()
    opt.step()
    opt.close()
