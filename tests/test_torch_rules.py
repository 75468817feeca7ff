"""The rivals that benchmarks/rules.py times make the same step as the fused rule they stand beside."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
rules = pytest.importorskip("rules")
torch_rules = pytest.importorskip("torch_rules")

SHAPES, STEPS = [(300,), (7,), (20, 50), (2, 3)], 3
CASES = [
    *rules.CASES,
    rules.Case("lars, decayed", "lars", "sgd", (), {"weight_decay": 0.1}),
    *(
        rules.Case(f"{rule}, delta {delta}", rule, like, (), {"weight_decay": 0.1, "delta": delta})
        for rule, like in (("sgdp", "sgd"), ("adamp", "adam"))
        for delta in (1.0, 10.0)  # few filters turn, but some layers; all filters turn
    ),
]


def options_of(case):
    """Longer steps than the benchmark's. The rivals' variance, a difference, needs ratios of a bounded size."""
    bounded = {"gsnr_eps": 0.1} if case.rule.startswith("vr") else {}
    return {**case.all_options, "lr": 0.01, **bounded}


def random_layers(*seeds):
    random = np.random.default_rng(seeds)
    return [torch.from_numpy(random.normal(size=shape).astype("float32")) for shape in SHAPES]


def joined(layers):
    return torch.cat([torch.as_tensor(layer).flatten() for layer in layers])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rival_of_a_rule_makes_the_same_steps(worlds, case):
    world, options = worlds(2), options_of(case)
    weights = random_layers(0)
    engine = rules.make_engine(world, [weight.clone() for weight in weights], case.rule, **options)
    own = [torch.zeros_like(joined(weights)) for _ in engine.workers]
    rival = torch_rules.make_rival(world.comm, weights, own, case.rule, **options)
    for step in range(STEPS):
        for v, worker in enumerate(engine.workers):
            layers = random_layers(1, step, world.rank * world.workers + v)
            for view, gradient in zip(worker.grads, layers, strict=True):
                view.copy_(gradient)
            torch.div(joined(layers), world.K, out=own[v])
        engine.step()
        rival.prepare()
        rival.step()
    close_to(joined(engine.master()), rival.flat)
    for worker, point in zip(engine.workers, rival.points, strict=True):
        close_to(joined(worker.weights), point)
    engine.close()


def test_every_rule_of_the_benchmark_has_a_rival():
    assert all(torch_rules.has_rival(case.rule) for case in rules.CASES)


def close_to(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
