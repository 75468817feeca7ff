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
