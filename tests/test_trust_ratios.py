"""LARS, LAMB and LANS: worked examples, zero norms, overflow, layers that straddle shards."""

import numpy as np
import pytest
from reference import assert_same_bits

import extrapcomm as xc

RULES = ["lars", "clars", "lamb", "lans"]


def train(world, rule, steps, w=(3.0, 4.0), dtype="float64", **hyper):
    """The weights after these (gradient, lr) of one layer, every worker with the same gradient."""
    engine = xc.Engine(world, np.array(w, dtype), rule, **hyper)
    for gradient, lr in steps:
        for worker in engine.workers:
            worker.grads[:] = gradient
        engine.step(lr=lr)
    result = engine.master()
    engine.close()
    return result


@pytest.mark.parametrize(
    "placement, wanted",
    [
        ({}, (2.965553904, 3.914232032)),
        ({"trust_in_buffer": True}, (2.952053904, 3.896232032)),
        ({"trust_outside": True}, (2.962918769, 3.910718519)),
    ],
)
def test_lars_example_in_its_three_placements(team, placement, wanted):
    """Two steps by hand; the second line is also what timm's Lars gives."""
    steps = [((0.6, 0.8), 0.5), ((0.0, 2.0), 1.0)]
    hyper = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.01, "eps": 0.0}
    np.testing.assert_allclose(train(team, "lars", steps, **hyper, **placement), wanted, rtol=1e-9)


def test_lamb_example(team):
    """Two steps of timm's Lamb without its clipping."""
    one, two = ((0.6, -0.8), 0.01), ((0.1, 0.2), 0.01)
    np.testing.assert_allclose(train(team, "lamb", [one]), (2.963423633, 4.034090605), rtol=1e-9)
    np.testing.assert_allclose(train(team, "lamb", [one, two]), (2.919156550, 4.057457292), rtol=1e-9)


@pytest.mark.parametrize("rule", ["lamb", "lans"])
def test_padding_has_no_part_in_norms(team, rule):
    """Adam's direction is 0 / 0 there without an epsilon."""
    steps = [((0.6, -0.8), 0.01), ((0.1, 0.2), 0.01)]
    np.testing.assert_allclose(train(team, rule, steps, eps=0.0), train(team, rule, steps), rtol=1e-6)


def test_lans_example(team):
    """By hand: the first step equals LAMB's, up to the epsilon in the normalisation of the gradient."""
    one, two = ((0.6, -0.8), 0.01), ((0.1, 0.2), 0.01)
    np.testing.assert_allclose(train(team, "lans", [one]), (2.963423633, 4.034090605), rtol=1e-6)
    np.testing.assert_allclose(train(team, "lans", [one, two]), (2.915725832, 4.023636595), rtol=1e-7)


def timms_lars(steps, w, decay, momentum, coefficient, always_adapt):
    """The update of timm's Lars without dampening and Nesterov momentum, for one layer."""
    w, buffer = np.array(w), np.zeros(len(w))
    for gradient, lr in steps:
        g = np.array(gradient)
        if decay != 0 or always_adapt:
            w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
            ratio = coefficient * w_norm / (g_norm + w_norm * decay + 1e-8) if w_norm and g_norm else 1.0
            g = (g + decay * w) * ratio
        buffer = momentum * buffer + g
        w = w - lr * buffer
    return w


@pytest.mark.parametrize("always_adapt", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_timms_with_and_without_adapting_always(team, decay, always_adapt):
    steps = [((0.6, 0.8), 0.5), ((0.0, 2.0), 1.0), ((1.0, -0.5), 0.25)]
    hyper = {"momentum": 0.9, "trust_coefficient": 0.01, "weight_decay": decay}
    got = train(team, "lars", steps, trust_in_buffer=True, always_adapt=always_adapt, **hyper)
    wanted = timms_lars(steps, (3.0, 4.0), decay, 0.9, 0.01, always_adapt)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_lars_adapts_without_decay_unless_told_otherwise(team):
    steps = [((0.6, 0.8), 0.5)]
    hyper = {"momentum": 0.0, "trust_coefficient": 0.01, "eps": 0.0}
    np.testing.assert_allclose(train(team, "lars", steps, **hyper), (2.985, 3.98), rtol=1e-12)
    plain = train(team, "lars", steps, always_adapt=False, **hyper)
    np.testing.assert_allclose(plain, (2.7, 3.6), rtol=1e-12)


def timms_lamb(steps, w, decay, trust_clip):
    """The update of timm's Lamb without its clipping of the gradient, for one layer; apex has no trust_clip."""
    w, mean, square = np.array(w), np.zeros(len(w)), np.zeros(len(w))
    for t, (gradient, lr) in enumerate(steps, 1):
        g = np.array(gradient)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        update = (mean / (1 - 0.9**t)) / (np.sqrt(square) / np.sqrt(1 - 0.999**t) + 1e-6) + decay * w
        ratio = 1.0
        if decay != 0:
            w_norm, u_norm = np.linalg.norm(w), np.linalg.norm(update)
            ratio = w_norm / u_norm if w_norm and u_norm else 1.0
            ratio = min(ratio, 1.0) if trust_clip else ratio
        w = w - lr * ratio * update
    return w


@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("w", [(3.0, 4.0), (0.03, 0.04)], ids=["above one", "below one"])
def test_lamb_is_timms_with_and_without_clipped_ratios(team, w, trust_clip):
    steps = [((0.6, -0.8), 0.01), ((0.1, 0.2), 0.01), ((-0.5, 0.3), 0.01)]
    got = train(team, "lamb", steps, w=w, trust_clip=trust_clip)
    np.testing.assert_allclose(got, timms_lamb(steps, w, 0.01, trust_clip), rtol=1e-9)


@pytest.mark.parametrize("rule", ["lars", "clars", "lamb", "vrlars", "vrlamb"])
def test_clipped_ratio_is_in_the_step_and_in_the_displacement(team, rule):
    """The ratio 5 / 0.5 is held to 1, and both are as with `adapt=False`."""
    w, gradient = np.array([3.0, 4.0]), np.array([0.3, 0.4])
    lars = {"trust_coefficient": 1.0, "momentum": 0.0} if "lars" in rule else {}
    points = []
    for held in ({"trust_clip": True}, {"adapt": False}, {}):
        engine = xc.Engine(team, w, rule, lr=0.1, extrapolation="local", inner_lr=0.5, **lars, **held)
        for worker in engine.workers:
            worker.grads[:] = gradient
        engine.step()
        points.append(np.stack([engine.master(), *(worker.weights for worker in engine.workers)]))
        engine.close()
    assert_same_bits(points[0], points[1])
    assert np.abs(points[2] - points[0]).min() > 0.01


@pytest.mark.parametrize("rule", ["lars", "lamb"])
def test_clipped_ratios_below_one_stay(team, rule):
    steps = [((0.6, -0.8), 0.1)]
    hyper = {"trust_coefficient": 1e-3} if rule == "lars" else {}
    free, held = (
        train(team, rule, steps, w=(0.03, 0.04), trust_clip=clip, **hyper) for clip in (False, True)
    )
    assert_same_bits(free, held)


@pytest.mark.parametrize("rule", ["LARS", "CLARS", "LAMB"])
def test_clipping_of_ratios_is_per_group(team, rule):
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.full((4,), 100.0)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "trust_clip": True}]
    own = {} if rule == "LAMB" else {"trust_coefficient": 1.0}
    opt = getattr(xc, rule)(groups, lr=0.01, **own, world=team)
    for v in range(team.workers):
        with opt.worker(v):
            for p in params:
                p.grad = torch.ones(4)
    opt.step()
    assert (100.0 - opt.master(0) > 0.5).all()
    assert (100.0 - opt.master(1) < 0.05).all()
    opt.close()


def test_clars_example(virtual):
    """By hand: worker gradients (1, 0), (0, 1), (-1, 1); the ratio is .005 / ((1 + 1 + sqrt 2) / 3)."""
    engine = xc.Engine(virtual(3), np.array([3.0, 4.0]), "clars", lr=1.0, trust_outside=True, eps=0.0)
    for worker, gradient in zip(engine.workers, [(1, 0), (0, 1), (-1, 1)], strict=True):
        worker.grads[:] = gradient
    engine.step()
    np.testing.assert_allclose(3 - engine.master()[0], 0.0, atol=1e-12)
    np.testing.assert_allclose(4 - engine.master()[1], 2 / 3 * 0.004393398, rtol=1e-6)
    engine.close()


def test_lars_ratio_of_the_same_gradients_is_larger(virtual):
    """0.0075, as the norm of the mean is 2/3: the mean of the norms is never below it."""
    engine = xc.Engine(virtual(3), np.array([3.0, 4.0]), "lars", lr=1.0, momentum=0.0, eps=0.0)
    for worker, gradient in zip(engine.workers, [(1, 0), (0, 1), (-1, 1)], strict=True):
        worker.grads[:] = gradient
    engine.step()
    np.testing.assert_allclose(4 - engine.master()[1], 2 / 3 * 0.0075, rtol=1e-9)
    engine.close()


@pytest.mark.parametrize("rule", RULES)
def test_tensor_of_zeros_still_moves_and_zero_gradients_do_no_harm(team, rule):
    moved = train(team, rule, [((1.0, -1.0), 0.1)], w=(0.0, 0.0))
    assert np.isfinite(moved).all() and moved[0] < 0 < moved[1]
    still = train(team, rule, [((0.0, 0.0), 0.1)], weight_decay=0.0)
    assert_same_bits(still, np.array([3.0, 4.0]))


@pytest.mark.parametrize("rule", RULES)
def test_norms_do_not_overflow(world, rule):
    """In float32 the squares would: 1e30 ** 2."""
    moved = train(world, rule, [((1e30, -1e30), 0.1)], dtype="float32", max_grad_norm=1.0)
    assert np.isfinite(moved).all() and moved[0] < 3


@pytest.mark.parametrize("rule", RULES)
def test_excluded_group_takes_the_ratio_one(team, rule):
    """`adapt` is per group: biases and norms move as without trust ratios."""
    torch = pytest.importorskip("torch")
    big, bias = torch.nn.Parameter(torch.full((5,), 100.0)), torch.nn.Parameter(torch.full((3,), 100.0))
    groups = [{"params": [big]}, {"params": [bias], "adapt": False, "weight_decay": 0.0}]
    opt = getattr(xc, rule.upper())(groups, lr=0.01, world=team)
    for v in range(team.workers):
        with opt.worker(v):
            big.grad, bias.grad = torch.ones(5), torch.ones(3)
    opt.step()
    step = 100.0 - opt.master(1)
    torch.testing.assert_close(step, torch.full((3,), 0.01), rtol=1e-3, atol=0)
    assert not torch.allclose(100.0 - opt.master(0), torch.full((5,), 0.01), rtol=0.1)
    opt.close()


def test_unknown_placement_on_one_rank_is_an_error_of_all(world):
    torch = pytest.importorskip("torch")
    trust = "sideways" if world.rank == world.size - 1 else "paper"
    with pytest.raises(xc.UsageError, match="trust must be one of paper, inside, outside, not 'sideways'"):
        xc.LARS([torch.nn.Parameter(torch.ones(2))], world=world, trust=trust)


def test_noise_in_the_padding_counts_in_no_norm(team):
    """adopt() takes the weights as they are displaced, and with them what lies between the parameters."""
    torch = pytest.importorskip("torch")

    def trained(inner_lr):
        param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        opt = xc.CLARS([param], weight_decay=1.0, extrapolation="gaussian", inner_lr=inner_lr, world=team)
        for _ in range(2):
            with torch.no_grad():
                param.fill_(0.5)
            opt.adopt()
            for v in range(team.workers):
                with opt.worker(v):
                    param.grad = torch.ones(1, dtype=torch.float64)
            opt.step()
        result = opt.master(0).numpy()
        opt.close()
        return result

    assert_same_bits(trained(100.0), trained(0.0))


@pytest.mark.parametrize("kind, choice", [("LARS", {"trust": "inside"}), ("VRSGD", {"layer_mean": "last"})])
def test_choice_for_one_group_is_refused(world, kind, choice):
    torch = pytest.importorskip("torch")
    group = {"params": [torch.nn.Parameter(torch.ones(2))], **choice}
    with pytest.raises(xc.UsageError, match="is for the whole optimizer"):
        getattr(xc, kind)([group], lr=0.1, world=world)


@pytest.mark.parametrize("rule", ["lars", "sgdp", "eg"])
def test_rule_with_a_buffer_in_any_case_takes_momentum_later(world, rule):
    engine = xc.Engine(world, np.ones((4, 4)), rule, lr=0.1, momentum=0.0)
    for momentum in (0.0, 0.9):
        for worker in engine.workers:
            worker.grads[:] = 1.0
        engine.step(momentum=momentum)
    assert np.isfinite(engine.master()).all()
    engine.close()
