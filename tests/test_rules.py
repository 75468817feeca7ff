"""Every rule x extrapolation x dtype x kind of world against the reference."""

from collections.abc import Mapping

import numpy as np
import pytest
from conftest import Pair
from hypothesis import given
from hypothesis import strategies as st
from reference import EXTRAPOLATIONS, RANDOM, RULES, WORKING, assert_same_bits, rounded, tree_sum

import extrapcomm as xc

TOLERANCE = {"float32": 1e-4, "float64": 1e-11}
LENGTHS = [5, 700, 1, 900, 0, 513, 2000]  # layers straddle shards and tiles
LISTED = xc._core.rules()
BY_GRADIENT = ["none", "local", "global", "anisotropic"]
CASES = [
    (rule, case, extrapolation)
    for rule in LISTED.keys() & RULES.keys()
    for i, case in enumerate(RULES[rule].cases)
    for extrapolation in (BY_GRADIENT if i == 0 else ["none", "local"])
]


def test_reference_has_every_rule_of_the_library():
    assert set(RULES) == set(LISTED)


@pytest.mark.parametrize("rule", LISTED)
def test_reference_has_every_hyper_parameter_of_the_library(rule):
    listed = LISTED[rule]
    names = {"betas" if name.startswith("beta") else name for name in listed["parameters"]}
    assert set(RULES[rule].defaults) == names | set(listed["flags"])
    assert RULES[rule].slots == len(listed["slots"])


def test_reference_has_every_extrapolation_of_the_library():
    assert EXTRAPOLATIONS.keys() | RANDOM.keys() == set(xc._core.extrapolations())


def test_tree_pairs_neighbours_and_carries_the_odd_one():
    a, b, c, d, e, f, g = np.float32([1e8, 1, -1e8, 1, 3e-8, 7, 1e-3])
    assert tree_sum([a]) == a
    assert tree_sum([a, b, c]) == (a + b) + c
    assert tree_sum([a, b, c, d, e]) == ((a + b) + (c + d)) + e
    assert tree_sum([a, b, c, d, e, f, g]) == ((a + b) + (c + d)) + ((e + f) + g)


def test_reference_rounds_bfloat16_as_torch_does():
    torch = pytest.importorskip("torch")
    every = np.arange(0, 2**32, 9973, dtype=np.uint32).view(np.float32)
    finite = every[np.isfinite(every)]
    assert_same_bits(rounded(finite, "bfloat16"), torch.from_numpy(finite).bfloat16().float().numpy())


FIRST_CASES = {rule: next(iter(RULES[rule].cases)) for rule in RULES}
OTHER_TYPES = [
    (rule, case, "local", dtype)
    for rule, case in FIRST_CASES.items()
    for dtype in WORKING
    if dtype != "float32"
]


@pytest.mark.parametrize(
    "rule, case, extrapolation, dtype", sorted([*((*case, "float32") for case in CASES), *OTHER_TYPES])
)
def test_step_equals_the_reference(pair, team, rule, case, extrapolation, dtype):
    options = {"rule": rule, "extrapolation": extrapolation, "tile": 1000, **RULES[rule].cases[case]}
    p = pair(team, LENGTHS, dtype, **options)
    for lr in (0.1, 0.05, 0.02):
        p.step(lr=lr)
    p.compare(TOLERANCE[WORKING[dtype]])


@pytest.mark.parametrize("extrapolation", ["local", "anisotropic"])
@pytest.mark.parametrize("rule", [rule for rule in LISTED if LISTED[rule]["factor"]])
def test_raw_displacement_leaves_the_gradient_as_it_is(pair, team, rule, extrapolation):
    p = pair(
        team, LENGTHS, "float32", rule=rule, extrapolation=extrapolation, displacement="raw", inner_lr=0.5
    )
    for _ in range(2):
        p.step(lr=0.1)
    p.compare(TOLERANCE["float32"])


@pytest.mark.parametrize("tile", [1, 7, 64, 1000, 5000])
@pytest.mark.parametrize("rule", LISTED)
def test_step_equals_the_reference_whatever_the_tile(pair, team, rule, tile):
    p = pair(team, LENGTHS, "float32", rule=rule, extrapolation="anisotropic", tile=tile)
    for _ in range(2):
        p.step(lr=0.1)
    p.compare(TOLERANCE["float32"])


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025])
@pytest.mark.parametrize("dtype", WORKING)
def test_step_equals_the_reference_at_the_edges_of_the_grid(pair, team, length, dtype):
    p = pair(team, [length], dtype, rule="sgd", extrapolation="local", momentum=0.9, nesterov=True)
    for _ in range(2):
        p.step(lr=0.1)
    p.compare(TOLERANCE[WORKING[dtype]])


@pytest.mark.parametrize("rule", LISTED)
def test_parameters_of_different_types_train_together(pair, team, rule):
    dtypes = ["float32", "bfloat16", "float16", "bfloat16", "float32"]
    p = pair(team, [1500, 700, 900, 0, 40], dtypes, rule=rule, extrapolation="anisotropic", tile=64)
    for _ in range(3):
        p.step(lr=0.1)
    p.compare(TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule, case, extrapolation", sorted(c for c in CASES if not LISTED[c[0]]["measures"])
)
def test_stages_in_passes_of_their_own_give_the_same_bits(pair, team, rule, case, extrapolation, dtype):
    """Not so for 16-bit weights, which are rounded once more between the passes."""
    options = {"extrapolation": extrapolation, "displacement": "raw", **RULES[rule].cases[case]}
    p = pair(team, LENGTHS, dtype, rule=rule, tile=64, **options)
    for fused in (False, True, False):
        p.step(lr=0.1, fused=fused)
        p.compare(TOLERANCE[WORKING[dtype]])


@pytest.mark.parametrize("rule", [rule for rule in LISTED if LISTED[rule]["measures"]])
def test_rules_with_trust_ratios_have_no_unfused_step(world, rule):
    engine = xc.Engine(world, np.ones(3, np.float32), rule)
    with pytest.raises(xc.UsageError, match="no rule with trust ratios"):
        engine.step_unfused()
    engine.close()


def test_preconditioned_displacement_has_no_unfused_step(world):
    engine = xc.Engine(world, np.ones(3, np.float32), "adam", extrapolation="local")
    with pytest.raises(xc.UsageError, match="no preconditioned and no random displacement"):
        engine.step_unfused()
    engine.close()


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=9),
    K=st.integers(1, 9),
    tile=st.integers(1, 6000),
    dtype=st.sampled_from(sorted(WORKING)),
    kind=st.sampled_from(sorted(CASES)),
)
def test_any_layout_equals_the_reference(virtual, lengths, K, tile, dtype, kind):
    rule, case, extrapolation = kind
    options = {"rule": rule, "extrapolation": extrapolation, "tile": tile, **RULES[rule].cases[case]}
    p = Pair(virtual(K), lengths, dtype, **options)
    for _ in range(2):
        p.step(lr=0.1)
    p.compare(TOLERANCE[WORKING[dtype]])
    p.engine.close()


@pytest.mark.parametrize(
    "inner_lr", ["lr", "lr/K", 0.3, lambda lr: lr**2], ids=["lr", "lr/K", "0.3", "square"]
)
@pytest.mark.parametrize("extrapolation", ["local", "global"])
def test_inner_rate_follows_the_rate_of_its_own_step(pair, team, extrapolation, inner_lr):
    p = pair(team, LENGTHS, "float64", extrapolation=extrapolation, inner_lr=inner_lr)
    for lr in (0.4, 0.2, 0.01):
        p.step(lr=lr)
        p.compare(TOLERANCE["float64"])


def test_hyper_parameters_stay_in_force_until_changed(pair, team):
    p = pair(team, [100], "float64", lr=0.1, momentum=0.5)
    p.step(lr=0.3)
    p.step()
    p.step(momentum=0.9, weight_decay=0.1)
    p.step()
    p.compare(TOLERANCE["float64"])


def test_first_gradient_is_taken_at_the_initial_weights(pair, team):
    p = pair(team, LENGTHS, "float32", extrapolation="local", inner_lr=1.0)
    p.compare(0)


def test_step_keeps_the_gradients(pair, team):
    p = pair(team, [1500], "float32", extrapolation="local")
    p.step(lr=0.1)
    before = [worker.grads[0].copy() for worker in p.engine.workers]
    p.engine.step()
    for worker, g in zip(p.engine.workers, before, strict=True):
        assert_same_bits(worker.grads[0], g)


@pytest.mark.parametrize("extrapolation", ["local", "global"])
def test_zero_inner_rate_publishes_the_weights_themselves(pair, team, extrapolation):
    """w - 0*g would make NaN of an infinite gradient."""
    p = pair(team, [4], "float32", extrapolation=extrapolation, inner_lr=0.0)
    for worker in p.engine.workers:
        worker.grads[0][...] = [np.inf, -np.inf, 1.0, 0.0]
    p.engine.step(lr=0.1)
    w = p.engine.master()[0]
    assert np.isinf(w[:2]).all() and not np.isnan(w).any()
    for worker in p.engine.workers:
        assert_same_bits(worker.weights[0], w)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "nonsense"},
        {"extrapolation": "nonsense"},
        {"extrapolation": "local", "inner_lr": "lr/L"},
        {"extrapolation": "local", "inner_lr": -0.1},
        {"tile": 0},
        {"nonsense": 1.0},
        {"lr": -1.0},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_wrong_options_are_usage_errors(world, wrong):
    with pytest.raises(xc.UsageError):
        xc.Engine(world, np.zeros(3, "float32"), **wrong)


def test_weights_keep_their_structure(world):
    w = np.arange(6, dtype="float32").reshape(2, 3)
    for weights in (w, [w, w[0]], {"a": w, "b": w[:, 1]}):
        engine = xc.Engine(world, weights)
        for same in (engine.weights, engine.grads, engine.master()):
            assert shapes(same) == shapes(weights)
        engine.close()


def shapes(weights):
    if isinstance(weights, Mapping):
        return {name: w.shape for name, w in weights.items()}
    return [w.shape for w in weights] if isinstance(weights, (list, tuple)) else weights.shape


def test_weights_of_rank_zero_win(world):
    engine = xc.Engine(world, np.full(2000, world.rank, "float64"))
    assert_same_bits(engine.weights, np.zeros(2000))
    assert_same_bits(engine.master(), np.zeros(2000))
    engine.close()
