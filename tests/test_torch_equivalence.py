"""The optimizers are torch.optim's on the averaged gradient; with extrapolation, the worked example."""

import numpy as np
import pytest
from reference import assert_same_bits

import extrapcomm as xc

torch = pytest.importorskip("torch")
nn, lr_scheduler = torch.nn, torch.optim.lr_scheduler
torch.set_num_threads(1)

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-decayed": ("SGD", {"lr": 0.1, "weight_decay": 0.05}),
    "sgd-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampened": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.05}),
    "sgd-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam-decayed": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "adamw-decayed": ("AdamW", {"lr": 0.01, "weight_decay": 0.3}),
    "sgd-maximized": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "maximize": True}),
    "adam-amsgrad": ("Adam", {"lr": 0.01, "betas": (0.8, 0.6), "weight_decay": 0.05, "amsgrad": True}),
    "adamw-amsgrad-maximized": (
        "AdamW",
        {"lr": 0.01, "betas": (0.8, 0.6), "amsgrad": True, "maximize": True},
    ),
}
SCHEDULES = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "step": lambda opt: lr_scheduler.StepLR(opt, 3, 0.1),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=12),  # momentum too
    "chained": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.ExponentialLR(opt, 0.7)],
        milestones=[4],
    ),
}
STEPS = 10
TYPES = [(torch.float64, 1e-11), (torch.float32, 2e-4)]


def found(name):
    """This library's class, torch's of the same name, and the hyper-parameters."""
    kind, hyper = OPTIMIZERS[name]
    return getattr(xc, kind), getattr(torch.optim, kind), hyper


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 2)).to(dtype)


def samples(step, K, dtype=torch.float64):
    """x and y of all K workers, four samples each."""
    random = np.random.default_rng(step)
    return (torch.tensor(random.normal(size=(K, 4, width)), dtype=dtype) for width in (6, 2))


def loss_of(model, x, y):
    return 0.01 * nn.functional.mse_loss(model(x), y)


def backward(model, opt, step, dtype=torch.float64):
    """Every worker's gradient on its own samples."""
    world = opt.world
    x, y = samples(step, world.K, dtype)
    for v in range(world.workers):
        with opt.worker(v):
            k = world.rank * world.workers + v
            loss_of(model, x[k], y[k]).backward()


def ours(make, schedule=None, set_to_none=True, dtype=torch.float64):
    """The weights after STEPS steps of an optimizer of this library."""
    model = perceptron(dtype)
    opt = make(model)
    scheduler = schedule and schedule(opt)
    for step in range(STEPS):
        opt.zero_grad(set_to_none=set_to_none)
        backward(model, opt, step, dtype)
        opt.step()
        if scheduler:
            scheduler.step()
    with opt.master_weights():
        weights = [p.detach().clone().numpy() for p in model.parameters()]
    opt.close()
    return weights


def torchs(make, K, schedule=None, dtype=torch.float64):
    """The same with torch.optim on the mean over all workers' samples."""
    model = perceptron(dtype)
    opt = make(model)
    scheduler = schedule and schedule(opt)
    for step in range(STEPS):
        opt.zero_grad()
        x, y = samples(step, K, dtype)
        loss_of(model, x.flatten(0, 1), y.flatten(0, 1)).backward()
        opt.step()
        if scheduler:
            scheduler.step()
    return [p.detach().numpy() for p in model.parameters()]


def assert_close(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", TYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_is_torchs_on_the_averaged_gradient(team, name, dtype, tolerance):
    mine, theirs, hyper = found(name)
    got = ours(lambda model: mine(model.parameters(), world=team, **hyper), dtype=dtype)
    wanted = torchs(lambda model: theirs(model.parameters(), **hyper), team.K, dtype=dtype)
    assert_close(got, wanted, tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["sgd-nesterov", "adam-decayed"])
def test_schedulers_of_torch_drive_the_optimizer(team, name, schedule):
    mine, theirs, hyper = found(name)
    got = ours(lambda model: mine(model.parameters(), world=team, **hyper), SCHEDULES[schedule])
    wanted = torchs(lambda model: theirs(model.parameters(), **hyper), team.K, SCHEDULES[schedule])
    assert_close(got, wanted, 1e-11)


@pytest.mark.parametrize(
    "kind, own",
    [
        (
            "SGD",
            [
                {"lr": 0.1, "momentum": 0.9},
                {"weight_decay": 0.1},
                {"lr": 0.3, "momentum": 0.5, "nesterov": True},
            ],
        ),
        ("Adam", [{"lr": 0.1, "betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"lr": 0.3, "eps": 1e-3}]),
        ("AdamW", [{"lr": 0.1, "betas": (0.5, 0.9)}, {"weight_decay": 0.5}, {"lr": 0.3, "eps": 1e-3}]),
    ],
)
def test_groups_have_hyper_parameters_of_their_own(team, kind, own):
    def groups(model):
        first, second = model[0], model[2]
        members = [[first.weight], [first.bias, second.weight], [second.bias]]
        return [{"params": params, **hyper} for params, hyper in zip(members, own, strict=True)]

    got = ours(lambda model: getattr(xc, kind)(groups(model), lr=0.05, world=team))
    wanted = torchs(lambda model: getattr(torch.optim, kind)(groups(model), lr=0.05), team.K)
    assert_close(got, wanted, 1e-11)


def test_hyper_parameters_changed_by_hand_take_effect(team):
    class ByHand:
        def __init__(self, opt):
            self.opt, self.t = opt, 0

        def step(self):
            self.t += 1
            self.opt.param_groups[0]["momentum"] = 0.5 + 0.04 * self.t
            self.opt.param_groups[0]["lr"] = 0.1 / self.t

    got = ours(lambda model: xc.SGD(model.parameters(), lr=0.1, momentum=0.5, world=team), ByHand)
    wanted = torchs(lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), team.K, ByHand)
    assert_close(got, wanted, 1e-11)


def test_clearing_gradients_either_way_gives_the_same_bits(team):
    def make(model):
        return xc.ExtrapSGD(model.parameters(), lr=0.1, momentum=0.9, world=team)

    for a, b in zip(ours(make, set_to_none=True), ours(make, set_to_none=False), strict=True):
        assert_same_bits(a, b)


def test_gradients_accumulate_until_they_are_cleared(team):
    def trained(passes):
        model = perceptron()
        opt = xc.SGD(model.parameters(), lr=0.1 / passes, world=team)
        opt.zero_grad()
        for _ in range(passes):
            backward(model, opt, step=0)
        opt.step()
        with opt.master_weights():
            weights = [p.detach().clone().numpy() for p in model.parameters()]
        opt.close()
        return weights

    assert_close(trained(2), trained(1), 1e-14)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw"])
def test_step_evaluates_a_closure(worlds, name):
    world, (ours, torchs, hyper) = worlds(1), found(name)
    models = perceptron(), perceptron()
    mine, theirs = ours(models[0].parameters(), world=world, **hyper), torchs(models[1].parameters(), **hyper)

    def closure(opt, model, x, y):
        def evaluate():
            opt.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        return evaluate

    for step in range(STEPS):
        x, y = samples(step, world.K)
        evaluate = closure(mine, models[0], x[world.rank], y[world.rank])
        before = evaluate().item()
        assert mine.step(evaluate).item() == before
        theirs.step(closure(theirs, models[1], x.flatten(0, 1), y.flatten(0, 1)))
    with mine.master_weights():
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-11, atol=1e-11)
    mine.close()


def test_optimizers_are_torch_optimizers(world):
    for kind in (xc.SGD, xc.ExtrapSGD, xc.Adam, xc.AdamW):
        opt = kind(perceptron().parameters(), world=world)
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups[0]["lr"] == 1e-3
        opt.close()


def test_decoupled_decay_of_adam_is_adamw(team):
    hyper = {"lr": 0.01, "weight_decay": 0.2, "world": team}
    adam = ours(lambda model: xc.Adam(model.parameters(), decoupled_weight_decay=True, **hyper))
    adamw = ours(lambda model: xc.AdamW(model.parameters(), **hyper))
    for a, b in zip(adam, adamw, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("wrong", [{"lr": -0.1}, {"weight_decay": -1.0}], ids=["lr", "weight_decay"])
def test_values_that_torch_refuses_are_refused(world, kind, wrong):
    with pytest.raises(ValueError):
        getattr(xc, kind)(perceptron().parameters(), world=world, **wrong)


# Two workers, f_k(w) = a_k/2 (w - b_k)^2 with a = (1, 3), b = (1, -1), from w = 2, lr .1, inner_lr .05:
# for each step the two points of differentiation, then the stored weight after it.
WORKED = {
    "plain": (
        {"extrapolation": "local"},
        [(2, 2, 1.5), (1.45, 1.05, 1.17), (1.1475, 0.8625, 0.88325), (0.875875, 0.603875, 0.648875)],
    ),
    "nesterov": (
        {"extrapolation": "local", "momentum": 0.9, "nesterov": True},
        [(2, 2, 1.05), (1, 0.6, 0.189), (0.189, -0.051, -0.56332), (-0.52277, -0.70567, -1.0880089)],
    ),
    "no inner rate": (
        {"extrapolation": "local", "inner_lr": 0.0},
        [(2, 2, 1.5), (1.5, 1.5, 1.1), (1.1, 1.1, 0.78), (0.78, 0.78, 0.524)],
    ),
    "no inner rate, nesterov": (
        {"extrapolation": "none", "momentum": 0.9, "nesterov": True},
        [(2, 2, 1.05), (1.05, 1.05, 0.056), (0.056, 0.056, -0.77088), (-0.77088, -0.77088, -1.3120576)],
    ),
    "past global": (
        {"extrapolation": "global"},
        [(2, 2, 1.5), (1.25, 1.25, 1.15), (0.975, 0.975, 0.855), (0.7075, 0.7075, 0.6135)],
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_example_of_the_paper(virtual, worlds, name):
    options, rows = WORKED[name]
    world = worlds(1) if worlds(1).K == 2 else virtual(2)
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    opt = xc.SGD([p], lr=0.1, world=world, **options)
    for *points, stored in rows:
        opt.zero_grad()
        for v in range(world.workers):
            k = world.rank * world.workers + v
            with opt.worker(v):
                assert p.item() == pytest.approx(points[k], abs=1e-12)
                (0.5 * (1, 3)[k] * (p - (1, -1)[k]) ** 2).sum().backward()
        opt.step()
        with opt.master_weights():
            assert p.item() == pytest.approx(stored, abs=1e-12)
    opt.close()


def test_every_rule_of_the_library_has_an_optimizer():
    from extrapcomm.fused import FusedOptimizer

    def below(kind):
        return {kind} | {each for child in kind.__subclasses__() for each in below(child)}

    assert all(getattr(xc, name) for name in xc.__all__)  # loads all modules
    assert {kind.RULE for kind in below(FusedOptimizer)} - {""} == set(xc._core.rules())


def test_a_momentum_that_goes_to_zero_ends_nesterovs(world):
    """As torch.optim.SGD, which asks for a momentum at construction only."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    ours = xc.SGD(models[0].parameters(), **options, world=world)
    theirs = torch.optim.SGD(models[1].parameters(), **options)
    for momentum in (0.9, 0.9, 0.0, 0.0, 0.5, 0.0, 0.9):
        x = torch.randn(4, 5)
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.param_groups[0]["momentum"] = momentum
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(a.detach(), b.detach())
    ours.close()


@pytest.mark.filterwarnings("error:Dynamo does not know", "error:.*recompile_limit")
@pytest.mark.parametrize("whole", [True, False], ids=["step and backward", "step"])
@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
def test_a_compiled_training_step_is_torchs(world, gradients, whole):
    torch.manual_seed(0)
    models = [torch.nn.Linear(6, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = xc.SGD(models[0].parameters(), lr=0.1, gradients=gradients, world=world)
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randn(8, 3)

    def trains(model, opt, take):
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        take()
        return loss

    steps = [lambda: trains(models[0], ours, ours.step), lambda: trains(models[1], theirs, theirs.step)]
    if whole:
        steps[0] = torch.compile(steps[0], backend="eager")
    else:
        take = torch.compile(ours.step, backend="eager")
        steps[0] = lambda: trains(models[0], ours, take)
    for _ in range(12):
        losses = [step() for step in steps]
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(models[0].weight, models[1].weight)
    ours.close()
