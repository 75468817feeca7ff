"""Storage that share_memory() or multiprocessing moves is noticed, and after adopt() training goes on as before."""

import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")

MODES = ("copy", "hook", "view")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))


def send(model):
    """Does what a multiprocessing queue does to the tensors that are put into it."""
    from torch.multiprocessing import reductions

    for p in model.parameters():
        reductions.reduce_storage(p.data.untyped_storage())


MOVES = {
    "share_memory": lambda model: model.share_memory(),
    "each parameter": lambda model: [p.share_memory_() for p in model.parameters()],
    "queue": send,
    "one": lambda model: model[2].weight.share_memory_(),
}


def train(model, opt, world, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        x = torch.randn(world.K, 11, 7)
        opt.zero_grad()
        for v in range(world.workers):
            with opt.worker(v):
                model(x[world.rank * world.workers + v]).square().mean().backward()
        opt.step()


def masters(model, opt):
    return [opt.master(i) for i in range(len(list(model.parameters())))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("move", MOVES)
def test_training_after_adopt_is_that_of_a_model_that_never_moved(team, move, mode):
    hyper = {"lr": 0.1, "momentum": 0.9, "gradients": mode, "world": team}
    model, still = net(), net()
    opt, wanted = xc.SGD(model.parameters(), **hyper), xc.SGD(still.parameters(), **hyper)
    for each, its in ((model, opt), (still, wanted)):
        train(each, its, team, 2)
    if team.rank == team.size - 1:
        MOVES[move](model)
    with pytest.raises(xc.UsageError, match="was written or replaced outside"):
        opt.step()
    opt.adopt()
    for each, its in ((model, opt), (still, wanted)):
        train(each, its, team, 3, start=2)
    for a, b in zip(masters(model, opt), masters(still, wanted), strict=True):
        assert torch.equal(a, b)
    for p, w in zip(model.parameters(), masters(model, opt), strict=True):
        assert torch.equal(p, w)
    opt.close()
    wanted.close()


@pytest.mark.parametrize("mode", MODES)
def test_moved_gradients_do_not_matter(team, mode):
    hyper = {"lr": 0.1, "momentum": 0.9, "gradients": mode, "world": team}
    model, still = net(), net()
    opt, wanted = xc.SGD(model.parameters(), **hyper), xc.SGD(still.parameters(), **hyper)
    for step in range(4):
        for each, its in ((model, opt), (still, wanted)):
            torch.manual_seed(step)
            its.zero_grad()
            for _ in range(2):
                for v in range(team.workers):
                    with its.worker(v):
                        each(torch.randn(5, 7) + v + team.rank).square().mean().backward()
                        if its is opt:
                            for p in each.parameters():
                                p.grad.share_memory_()
            its.step()
    for a, b in zip(masters(model, opt), masters(still, wanted), strict=True):
        assert torch.equal(a, b)
    opt.close()
    wanted.close()


def test_moved_in_worker_is_an_error_at_the_next_step_and_adopting_ends_it(worlds):
    world = worlds(2)
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    train(model, opt, world, 1)
    with opt.worker(1):
        if world.rank == 0:
            model.share_memory()
    with pytest.raises(xc.UsageError, match="of worker 1 was written or replaced outside"):
        opt.step()
    opt.adopt()
    before = masters(model, opt)
    train(model, opt, world, 1, start=1)
    for v in range(2):
        with opt.worker(v):
            for p, w, old in zip(model.parameters(), masters(model, opt), before, strict=True):
                assert torch.equal(p, w) and not torch.equal(w, old)
    opt.close()


def test_moved_model_gets_the_master_weights_when_the_optimizer_is_closed(world):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.5, world=world)
    train(model, opt, world, 1)
    wanted = masters(model, opt)
    model.share_memory()
    with pytest.raises(xc.UsageError, match="was written or replaced"), opt.master_weights():
        pass
    opt.close()
    for p, w in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(p, w) and p.is_shared()


def test_moved_model_takes_what_a_checkpoint_brings(world):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=world)
    train(model, opt, world, 1)
    saved = opt.state_dict()
    train(model, opt, world, 1)
    model.share_memory()
    opt.load_state_dict(saved)
    for p, w in zip(model.parameters(), masters(model, opt), strict=True):
        assert torch.equal(p, w)
    before = masters(model, opt)
    train(model, opt, world, 1)
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)
    opt.close()


def test_moved_and_loaded_weights_are_adopted_by_every_worker(team):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=team)
    opt.attach(model)
    train(model, opt, team, 1)
    model.load_state_dict({name: torch.full_like(t, 2.0) for name, t in model.state_dict().items()})
    model.share_memory()
    for v in range(team.workers):
        with opt.worker(v):
            assert all((p == 2).all() for p in model.parameters())
    opt.adopt()
    for v in range(team.workers):
        with opt.worker(v):
            assert all((p == 2).all() for p in model.parameters())
    train(model, opt, team, 1)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), masters(model, opt), strict=True))
    opt.close()


def test_data_replaced_while_writing_master_weights_is_committed(team):
    model = net()
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, inner_lr=0.5, world=team)
    train(model, opt, team, 1)
    with opt.master_weights(write=True):
        for p in model.parameters():
            p.data = torch.full_like(p, 3.0)
    assert all((w == 3).all() for w in masters(model, opt))
    train(model, opt, team, 1)
    assert not any((p == 3).all() for p in model.parameters())
    opt.close()


def test_data_of_another_shape_while_writing_master_weights_commits_nothing(team):
    model = net()
    opt = xc.SGD(model.parameters(), lr=0.1, world=team)
    train(model, opt, team, 1)
    before = masters(model, opt)
    with pytest.raises(xc.UsageError, match="another shape or type"), opt.master_weights(write=True):
        if team.rank == team.size - 1:
            model[0].bias.data = torch.zeros(3)
    assert all(torch.equal(opt.master(i), before[i]) for i in (0, 2, 3))
    opt.close()


def test_master_weights_are_not_written_inside_worker(worlds):
    world = worlds(2)
    p = torch.nn.Parameter(torch.ones(3))
    opt = xc.SGD([p], lr=0.1, world=world)
    with (
        opt.worker(1),
        pytest.raises(xc.UsageError, match=r"write=True\) inside worker"),
        opt.master_weights(write=True),
    ):
        pass
    opt.close()
