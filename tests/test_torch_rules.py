"""The rivals that benchmarks/rules.py times make the same step as the fused rule they stand beside."""

import numpy as np
import pytest

import extrapcomm as xc

torch = pytest.importorskip("torch")
rules = pytest.importorskip("rules")
torch_rules = pytest.importorskip("torch_rules")

LENGTHS, STEPS = [300, 7, 1000], 3
DECAYED = rules.Case("lars, decayed", "lars", "sgd", (), {"weight_decay": 0.1})


def random_layers(*seeds):
    random = np.random.default_rng(seeds)
    return [torch.from_numpy(random.normal(size=n).astype("float32")) for n in LENGTHS]


@pytest.mark.parametrize("case", [*rules.CASES, DECAYED], ids=lambda case: case.name)
def test_rival_of_a_rule_makes_the_same_steps(worlds, case):
    world = worlds(2)
    options = {**case.all_options, "lr": 0.01}
    weights = random_layers(0)
    engine = xc.Engine(world, [weight.clone() for weight in weights], case.rule, **options)
    own = [torch.zeros(sum(LENGTHS)) for _ in engine.workers]
    rival = torch_rules.make_rival(world.comm, weights, own, case.rule, **options)
    for step in range(STEPS):
        for v, worker in enumerate(engine.workers):
            layers = random_layers(1, step, world.rank * world.workers + v)
            for view, gradient in zip(worker.grads, layers, strict=True):
                view.copy_(gradient)
            torch.div(torch.cat(layers), world.K, out=own[v])
        engine.step()
        rival.prepare()
        rival.step()
    close_to(torch.cat([torch.as_tensor(w) for w in engine.master()]), rival.flat)
    for worker, point in zip(engine.workers, rival.points, strict=True):
        close_to(torch.cat(list(worker.weights)), point)
    engine.close()


def close_to(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
