"""Recipes of docs/embedding.md: code that has other weights in the model for a while, or changes them by itself."""

import copy
import re
from pathlib import Path

import pytest
from reference import assert_same_bits

import extrapcomm as xc

torch = pytest.importorskip("torch")

DOCUMENT = Path(__file__).parent.parent / "docs" / "embedding.md"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DISPLACED = {"none": {"inner_lr": 0.0}, "zero": {"inner_lr": 0.0}, "local": {"inner_lr": 0.5}}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    return model.to(dtype)


def optimizer(model, world, extrapolation, **more):
    name = "none" if extrapolation == "none" else "local"
    return xc.ExtrapSGD(
        model.parameters(),
        lr=0.1,
        momentum=0.9,
        world=world,
        extrapolation=name,
        **DISPLACED[extrapolation],
        **more,
    )


def batch(world, v, step, dtype=torch.float32):
    torch.manual_seed(1000 * step + world.rank * world.workers + v)
    return torch.randn(5, 7, dtype=torch.float32).to(dtype)


def backward(model, opt, world, step):
    opt.zero_grad()
    for v in range(world.workers):
        with opt.worker(v):
            model(batch(world, v, step, model[0].weight.dtype)).square().mean().backward()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()


def assert_bits(left, right):
    for a, b in zip(left, right, strict=True):
        assert_same_bits(bits_of(a), bits_of(b))


def swap_by_copy(model, other):
    with torch.no_grad():
        for p, q in zip(model.parameters(), other, strict=True):
            p.copy_(q)


def swap_by_data(model, other):
    for p, q in zip(model.parameters(), other, strict=True):
        p.data.copy_(q)


def swap_by_pointer(model, other):
    for p, q in zip(model.parameters(), other, strict=True):
        p.data = q


def swap_by_loading(model, other):
    model.load_state_dict(dict(zip(model.state_dict(), other, strict=True)))


SWAPS = {"copy": swap_by_copy, "data": swap_by_data, "pointer": swap_by_pointer, "loading": swap_by_loading}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extrapolation", ["none", "zero"])
def test_restored_weights_are_accepted_without_displacement(team, dtype, extrapolation):
    model = net(dtype)
    opt = optimizer(model, team, extrapolation)
    for step in range(3):
        backward(model, opt, team, step)
        for v in range(team.workers):
            with opt.worker(v):
                before = values(model)
                swap_by_copy(model, [torch.zeros_like(p) for p in before])
                swap_by_copy(model, before)
        opt.step()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.clone())
    with opt.master_weights():
        pass
    opt.step()
    opt.close()


@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_weights_that_are_not_restored_are_refused_in_words_that_name_the_context(team, extrapolation):
    model = net()
    opt = optimizer(model, team, extrapolation)
    backward(model, opt, team, 0)
    opt.step()
    if team.rank == team.size - 1:
        with torch.no_grad():
            model[2].bias.add_(1e-3)
    with pytest.raises(xc.UsageError, match=r"'0\.3' was written.*opt\.kept_weights\(\)"):
        opt.step()
    opt.close()


def test_displaced_weights_are_refused_even_where_they_were_restored(team):
    model = net()
    opt = optimizer(model, team, "local")
    backward(model, opt, team, 0)
    opt.step()
    swap_by_copy(model, values(model))
    with pytest.raises(xc.UsageError, match=r"opt\.kept_weights\(\)"):
        opt.step()
    opt.close()


def test_displacement_ends_layer_by_layer_when_the_inner_rate_is_zero(team):
    """A layer without a gradient stays where an earlier step has displaced it."""
    model = net()
    opt = optimizer(model, team, "local")
    backward(model, opt, team, 0)
    opt.step()
    opt.param_groups[0]["inner_lr"] = 0.0
    backward(model, opt, team, 1)
    for v in range(team.workers):
        with opt.worker(v):
            model[0].weight.grad = None
    opt.step()
    with torch.no_grad():
        model[0].bias.copy_(model[0].bias.clone())
    backward(model, opt, team, 2)
    for v in range(team.workers):
        with opt.worker(v):
            model[0].weight.grad = None
    opt.step()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.clone())
    with pytest.raises(xc.UsageError, match=r"'0\.0' was written"):
        opt.step()
    opt.adopt()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.clone())
    opt.step()
    opt.close()


def test_local_weights_are_refused_until_they_are_averaged(team):
    model = net()
    opt = xc.PostLocalSGD(model.parameters(), lr=0.1, local_steps=100, start=0, world=team)
    backward(model, opt, team, 0)
    opt.step()
    with pytest.raises(xc.UsageError, match="was written"):
        swap_by_copy(model, values(model))
        opt.average()
    opt.adopt()
    backward(model, opt, team, 1)
    opt.step()
    opt.average()
    swap_by_copy(model, values(model))
    opt.average()
    opt.close()


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_weights_come_back_bit_for_bit_for_every_worker(team, dtype, swap):
    model, still = net(dtype), net(dtype)
    opt, wanted = optimizer(model, team, "local"), optimizer(still, team, "local")
    opt.attach(model)
    for step in range(3):
        for each, its in ((model, opt), (still, wanted)):
            backward(each, its, team, step)
            its.step()
        for v in range(team.workers):
            with opt.worker(v):
                before = values(model)
                others = [torch.full_like(p, float("nan")) for p in before]
                with pytest.raises(KeyError), opt.kept_weights():
                    SWAPS[swap](model, others)
                    assert all(p.isnan().all() for p in model.parameters())
                    raise KeyError
                assert_bits(values(model), before)
    assert_bits([opt.master(i) for i in range(4)], [wanted.master(i) for i in range(4)])
    opt.close()
    wanted.close()


def test_loaded_weights_come_back_too(team):
    model = net()
    opt = optimizer(model, team, "local")
    opt.attach(model)
    backward(model, opt, team, 0)
    opt.step()
    model.load_state_dict({name: torch.full_like(t, 2.0) for name, t in model.state_dict().items()})
    with opt.kept_weights():
        swap_by_copy(model, [torch.zeros_like(p) for p in model.parameters()])
    opt.adopt()
    assert all((opt.master(i) == 2).all() for i in range(4))
    opt.close()


def test_what_makes_no_sense_inside_kept_weights_is_refused(team):
    model = net()
    opt = optimizer(model, team, "local")
    backward(model, opt, team, 0)
    opt.step()
    saved, local = opt.state_dict(), opt.local_state_dict()
    with opt.kept_weights():
        for call in (
            opt.step,
            opt.adopt,
            lambda: opt.load_state_dict(saved),
            lambda: opt.load_local_state_dict(local),
            lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
            lambda: opt.worker(0).__enter__(),
            lambda: opt.master_weights().__enter__(),
            lambda: opt.kept_weights().__enter__(),
        ):
            with pytest.raises(xc.UsageError, match=r"inside kept_weights\(\): leave the context first"):
                call()
    with (
        opt.master_weights(),
        pytest.raises(xc.UsageError, match=r"kept_weights\(\) inside master_weights\(\)"),
        opt.kept_weights(),
    ):
        pass
    backward(model, opt, team, 1)
    opt.step()
    opt.close()


@pytest.mark.parametrize("swap", ["copy", "pointer"])
def test_optimizer_closed_inside_kept_weights_leaves_the_master_weights(world, swap):
    model = net()
    opt = optimizer(model, world, "local")
    backward(model, opt, world, 0)
    opt.step()
    wanted = [opt.master(i) for i in range(4)]
    with opt.kept_weights():
        SWAPS[swap](model, [torch.zeros_like(p) for p in model.parameters()])
        opt.close()
    assert_bits(values(model), wanted)


# --- the recipes themselves -----------------------------------------------------------------------------------------


def recipes():
    """Return the blocks of code under the document's heading "Recipes"."""
    section = re.search(r"^## Recipes$(.*?)^# ", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL).group(1)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize("extrapolation", ["none", "local"])
@pytest.mark.parametrize("recipe", recipes(), ids=["average", "SAM", "embedding"])
def test_documented_recipe_runs_and_training_goes_on(world, recipe, extrapolation):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4)
    opt = optimizer(model, world, extrapolation)

    def loss_of(model):
        return model(torch.tensor([1, 3])).square().sum()

    names = {"torch": torch, "model": model, "opt": opt, "loss_of": loss_of, "evaluate": loss_of}
    names |= {"rho": 0.05, "max_norm": 1.0}
    names |= {"get_ema_multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn}
    for _ in range(3):
        opt.zero_grad()
        loss_of(model).backward()
        exec(recipe, names)
    before = opt.master(0)
    opt.zero_grad()
    loss_of(model).backward()
    opt.step()
    assert not torch.equal(opt.master(0), before)
    opt.close()


@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_recipe_of_averaged_weights_changes_nothing_of_the_training(team, extrapolation):
    model, still = net(), net()
    opt, wanted = optimizer(model, team, extrapolation), optimizer(still, team, extrapolation)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    mean = None
    for step in range(4):
        for each, its in ((model, opt), (still, wanted)):
            backward(each, its, team, step)
            its.step()

        with opt.master_weights():
            average.update_parameters(model)

        with opt.kept_weights(), torch.no_grad():
            for param, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
                param.copy_(averaged)
            seen = values(model)

        master = [opt.master(i) for i in range(4)]
        mean = master if mean is None else [0.5 * m + 0.5 * w for m, w in zip(mean, master, strict=True)]
        for a, b in zip(seen, mean, strict=True):
            torch.testing.assert_close(a, b)
    assert_bits([opt.master(i) for i in range(4)], [wanted.master(i) for i in range(4)])
    opt.close()
    wanted.close()


def sam_step(model, opt, loss_of, rho):
    """As in docs/embedding.md, for one worker."""
    opt.zero_grad()
    loss_of(model).backward()
    with opt.kept_weights():
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
            for p in model.parameters():
                p.add_(p.grad * (rho / (norm + 1e-12)))
        opt.zero_grad()
        loss_of(model).backward()
    opt.step()


@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_recipe_of_sam_is_the_formula(world, extrapolation):
    """Each rank perturbs by its own gradient (m-sharpness); the step takes the mean of the second gradients."""
    model, rho = net(), 0.05
    opt = optimizer(model, world, extrapolation)
    plain = net()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        points, losses = [], []
        for rank in range(world.size):
            torch.manual_seed(1000 * step + rank)
            x = torch.randn(5, 7)
            losses.append(lambda m, x=x: m(x).square().mean())
            points.append(world.comm.bcast(values(model) if rank == world.rank else None, root=rank))
        second = []
        for loss_of, point in zip(losses, points, strict=True):
            probe = copy.deepcopy(plain)
            swap_by_data(probe, point)
            probe.zero_grad()
            loss_of(probe).backward()
            first = [p.grad.clone() for p in probe.parameters()]
            norm = sum(g.square().sum() for g in first).sqrt()
            swap_by_data(probe, [w + g * (rho / norm) for w, g in zip(point, first, strict=True)])
            probe.zero_grad()
            loss_of(probe).backward()
            second.append([p.grad for p in probe.parameters()])
        for p, *grads in zip(plain.parameters(), *second, strict=True):
            p.grad = torch.stack(grads).mean(0)
        sgd.step()
        sam_step(model, opt, losses[world.rank], rho)
        for i, p in enumerate(plain.parameters()):
            torch.testing.assert_close(opt.master(i), p.detach(), rtol=2e-5, atol=2e-6)
    opt.close()


@pytest.mark.parametrize("extrapolation", ["none", "local"])
def test_recipe_of_bounded_embeddings_keeps_every_row_within_the_norm(world, extrapolation):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4)  # without max_norm, which would write in every forward
    opt = optimizer(model, world, extrapolation)
    for step in range(3):
        opt.zero_grad()
        (-model(torch.tensor([1, 3, 5 + world.rank % 2])).square().sum()).backward()
        opt.step()

        with opt.master_weights(write=True), torch.no_grad():
            model.weight.renorm_(2, 0, 1.0)  # rows of norm 1 at most

        assert (opt.master(0).norm(dim=1) <= 1 + 1e-5).all(), step
        assert torch.equal(model.weight.detach(), opt.master(0))
    opt.close()


def test_max_norm_itself_is_refused_as_soon_as_it_changes_a_row(world):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4, max_norm=100.0)
    opt = optimizer(model, world, "none")
    model(torch.tensor([1, 3])).square().sum().backward()
    opt.step()  # no row was changed
    model.max_norm = 0.5
    model(torch.tensor([1, 3])).square().sum().backward()
    with pytest.raises(xc.UsageError, match="was written"):
        opt.step()
    opt.close()
