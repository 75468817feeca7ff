"""Parameters in another order on another rank are an error that names them, and nothing else is taken for it."""

import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")


def is_odd(world):
    return world.rank == world.size - 1


def needs_two(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")


def net(seed=0, dtype=torch.float32, layers=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(layers)]).to(dtype)


def swapped(items, i=0, j=2):
    items = list(items)
    items[i], items[j] = items[j], items[i]
    return items


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["SGD", "ExtrapAdam", "LAMB"])
def test_exchanged_layers_of_equal_shape_are_named(world, kind, dtype):
    needs_two(world)
    model = net(dtype=dtype)
    params = swapped(model.parameters(), 2, 4) if is_odd(world) else list(model.parameters())
    before = [p.detach().clone() for p in params]
    words = rf"rank 0 and rank {world.size - 1} hand over .* '0\.2' of shape \(5, 5\) of rank 0 is '0\.4' of shape"
    with pytest.raises(xc.MismatchError, match=words):
        getattr(xc, kind)(params, lr=0.1, world=world)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_exchange_is_found_where_rank_0_has_other_values(world):
    if world.size < 3:
        pytest.skip("needs two ranks beside rank 0")
    model = net(seed=min(world.rank, 1))
    params = swapped(model.parameters()) if is_odd(world) else list(model.parameters())
    with pytest.raises(xc.MismatchError, match=rf"rank 1 and rank {world.size - 1} hand over"):
        xc.SGD(params, lr=0.1, world=world)


def test_sets_of_parameters_are_refused_unless_their_orders_agree(world):
    needs_two(world)
    model = net(layers=20)
    params = list(set(model.parameters()))
    mine = [next(i for i, p in enumerate(model.parameters()) if p is q) for q in params]
    if world.comm.allgather(mine) == [mine] * world.size:
        pytest.skip("the ranks' sets happen to have one order")
    with pytest.raises(xc.MismatchError):
        xc.SGD(params, lr=0.1, world=world)


@pytest.mark.parametrize("groups", ["within one", "between two", "whole"])
def test_exchanges_between_groups_are_found(world, groups):
    needs_two(world)
    model = net()
    first, second = list(model[0].parameters()), list(model[1].parameters())
    if is_odd(world):
        if groups == "within one":
            first = first[::-1]
        elif groups == "between two":
            first[0], second[0] = second[0], first[0]
        else:
            first, second = second, first
    with pytest.raises(xc.MismatchError):
        xc.SGD([{"params": first}, {"params": second}], lr=0.1, world=world)


def test_exchange_in_an_added_group_changes_nothing(world):
    needs_two(world)
    first, model = torch.nn.Parameter(torch.ones(3)), net()
    opt = xc.SGD([first], lr=0.5, world=world)
    params = list(model.parameters())
    with pytest.raises(xc.MismatchError, match="in different orders"):
        opt.add_param_group({"params": swapped(params) if is_odd(world) else params})
    assert len(opt.param_groups) == 1
    first.grad = torch.ones(3)
    opt.step()
    assert first.tolist() == [0.5] * 3
    opt.add_param_group({"params": params})
    opt.close()


def trains(params, world):
    opt = xc.SGD(params, lr=0.1, world=world)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_different_seeds_are_legal(world, dtype):
    params = list(net(seed=world.rank, dtype=dtype).parameters())
    trains(params, world)
    assert (
        world.comm.allgather(params[0].float().sum().item()) == [params[0].float().sum().item()] * world.size
    )


LEGAL = {
    "zeros": lambda rank: [torch.zeros(4), torch.zeros(4), torch.zeros(4)],
    "ones": lambda rank: swapped([torch.ones(4), torch.ones(4), torch.ones(4)]),
    "empty": lambda rank: [torch.empty(0), torch.empty(0, 3), torch.tensor(1.0)],
    "nan": lambda rank: [torch.full((4,), float("nan")), torch.ones(4)],
    "zeros on one rank": lambda rank: [torch.full((4,), float(rank)), torch.zeros(4)],
    "one rank's are other values": lambda rank: [torch.full((4,), 1.0 + rank), torch.full((4,), 7.0)],
    "other layout": lambda rank: [torch.arange(6.0).reshape(3, 2).t(), torch.ones(4).expand(2, 4)],
    "large": lambda rank: [torch.arange(30001.0), torch.arange(30001.0) + rank],
}


@pytest.mark.parametrize("case", LEGAL)
def test_alike_and_unlike_values_are_no_false_alarm(world, case):
    trains([torch.nn.Parameter(tensor) for tensor in LEGAL[case](world.rank)], world)


def test_equal_biases_between_unequal_weights_are_no_false_alarm(world):
    model = net(seed=world.rank)
    for layer in model:
        torch.nn.init.zeros_(layer.bias)
    trains(list(model.parameters()), world)


def test_permuted_values_of_a_parameter_are_not_a_permutation_of_parameters(world):
    p = torch.nn.Parameter(torch.arange(4.0).roll(world.rank))
    trains([p, torch.nn.Parameter(torch.arange(4.0) + 1)], world)


def test_other_models_get_the_engines_own_error(world):
    needs_two(world)
    params = [torch.nn.Parameter(torch.ones(3 + is_odd(world)))]
    with pytest.raises(xc.MismatchError, match="build different engines"):
        xc.SGD(params, lr=0.1, world=world)


# -- Names in attached models ----------------------------------------------------------------------------------------


def step(opt, params):
    for v in range(opt.world.workers):
        with opt.worker(v):
            for p in params:
                p.grad = torch.ones_like(p)
    opt.step()


def attached(world, order, seed, model=None):
    """An optimizer whose parameters come in this order on the last rank, and its model."""
    model = net(seed) if model is None else model
    params = order(list(model.parameters())) if is_odd(world) else list(model.parameters())
    opt = xc.SGD(params, lr=0.1, world=world)
    opt.attach(model)
    return opt, params


@pytest.mark.parametrize("values", ["equal", "different"])
def test_models_that_name_parameters_in_another_order_are_refused_at_the_next_step(world, values):
    needs_two(world)
    model = net(seed=world.rank)
    if values == "equal":
        for p in model.parameters():
            torch.nn.init.zeros_(p)
    opt, params = attached(world, swapped, 0, model)
    before = opt.master(0)
    for _ in range(2):
        with pytest.raises(xc.MismatchError, match="name the optimizer's parameters in different orders"):
            step(opt, params)
    assert torch.equal(opt.master(0), before)
    opt.close()


def test_model_that_was_made_in_another_order_is_refused(world):
    needs_two(world)
    model = torch.nn.Module()
    for name in ("b", "a") if is_odd(world) else ("a", "b"):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(3)))
    opt, params = attached(world, list, 0, model)
    with pytest.raises(xc.MismatchError, match="in different orders"):
        step(opt, params)
    opt.close()


@pytest.mark.parametrize("seeds", ["one", "many"])
def test_models_that_name_parameters_alike_train(team, seeds):
    opt, params = attached(team, list, team.rank if seeds == "many" else 0)
    step(opt, params)
    opt.close()


def wrapped(model):
    outer = torch.nn.Module()
    outer.inner = torch.nn.Module()
    outer.inner.module = model
    return outer


WAYS = {
    "on one rank only": lambda opt, model, odd: opt.attach(model) if odd else None,
    "not on one rank": lambda opt, model, odd: None if odd else opt.attach(model),
    "twice on one rank": lambda opt, model, odd: [opt.attach(model) for _ in range(1 + odd)],
    "wrapped on one rank": lambda opt, model, odd: opt.attach(wrapped(model) if odd else model),
    "both on one rank": lambda opt, model, odd: [
        opt.attach(model),
        opt.attach(wrapped(model)) if odd else None,
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_attaching_is_each_ranks_own_affair(world, way):
    model = net(seed=world.rank)
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    WAYS[way](opt, model, is_odd(world))
    step(opt, list(model.parameters()))
    opt.close()


def test_ranks_may_attach_between_different_steps(world):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    for turn in range(world.size + 1):
        if turn == world.rank:
            opt.attach(model)
        step(opt, list(model.parameters()))
    opt.close()


def test_wrong_orders_are_found_among_the_ranks_that_have_attached(world):
    if world.size < 3:
        pytest.skip("needs three ranks, of which one has attached no model")
    model = net(seed=world.rank)
    params = swapped(model.parameters()) if is_odd(world) else list(model.parameters())
    opt = xc.SGD(params, lr=0.1, world=world)
    if world.rank > 0:
        opt.attach(model)
    with pytest.raises(xc.MismatchError, match=rf"rank 1.* and rank {world.size - 1}.* have attached"):
        step(opt, params)
    opt.close()


@pytest.mark.parametrize("wrong", [False, True])
def test_names_are_compared_anew_for_added_groups(world, wrong):
    if wrong:
        needs_two(world)
    model = net(seed=world.rank)
    opt = xc.SGD(model[0].parameters(), lr=0.1, world=world)
    opt.attach(model)
    step(opt, list(model[0].parameters()))
    added = [p for layer in model[1:] for p in layer.parameters()]
    if wrong and is_odd(world):
        added = swapped(added)
    opt.add_param_group({"params": added})
    if wrong:
        with pytest.raises(xc.MismatchError, match="in different orders"):
            step(opt, list(model.parameters()))
    else:
        step(opt, list(model.parameters()))
    opt.close()


def test_parts_that_a_model_gets_later_count_too(world):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    opt.attach(model)
    model.append(torch.nn.Linear(5, 5))
    opt.add_param_group({"params": model[3].parameters()})
    step(opt, list(model.parameters()))
    opt.close()


def test_several_models_and_tied_names_train(team):
    left, right = net(1), net(2)
    right[1].weight = right[0].weight
    params = [*left.parameters(), *right.parameters()]
    opt = xc.SGD(params, lr=0.1, world=team)
    opt.attach(left)
    opt.attach(right)
    step(opt, params)
    opt.close()


def test_local_steps_compare_names_when_they_average(world):
    needs_two(world)
    model = net(seed=world.rank)
    params = swapped(model.parameters()) if is_odd(world) else list(model.parameters())
    opt = xc.PostLocalSGD(params, lr=0.1, world=world, local_steps=2, start=0)
    opt.attach(model)
    step(opt, params)
    with pytest.raises(xc.MismatchError, match="in different orders"):
        step(opt, params)
    opt.close()
