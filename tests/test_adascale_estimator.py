"""AdaScale's estimator against the paper's formulas and against the figures of fairscale's and adaptdl's tests."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import averaged, baseline_sample, gain_ratio

import extrapcomm as xc
from extrapcomm.adascale import AdaScale, Average

FAIRSCALE = {"rel": 1e-5, "abs": 1e-8}  # np.allclose's, which its tests use
EXACT = {"rel": 1e-9}


def sums(grads):
    """n, the sum of the squared norms, the squared norm of the mean."""
    grads = np.array(grads, np.float64)
    return len(grads), [float(np.sum(grads**2))], [float(np.sum(grads.mean(0) ** 2))]


def step(adascale, *measured):
    proposal = adascale.measure(*measured)
    adascale.commit(proposal)
    return proposal.gains


def expected_sums(n, var, sqr, scale):
    """What a step would measure whose samples are exactly these."""
    mean = sqr + var / scale
    return n, [n * (mean + (n - 1) * var / scale)], [mean]


def linear(x, outputs=2, bias=True):
    """The gradient of sum(Linear(x)), flat."""
    return np.array([*x] * outputs + [1.0] * (outputs if bias else 0))


# --- figures of other implementations


@pytest.mark.parametrize(
    ("first", "second", "fairscale", "exact", "var", "sqr"),
    [
        ([1, 0], [0, 1], 4 / 3, 1.3333333333333333, 2, 2),
        ([1, 1], [1, 1], 1.0000001249999846, 1.0000000833333264, 1e-6, 6),
        ([-1, 1], [1, -1], 2.0, 2.0, 8, 0),
        ([1, 4], [5, 0.5], 1.4688796680497926, 1.468879668049793, 28.25, 16),
        ([-0.2, 3], [5, 0.5], 1.8472893901708, 1.84728938661, 33.29, 3),
    ],
)
def test_two_gradients_have_fairscales_gain(first, second, fairscale, exact, var, sqr):
    adascale = AdaScale()
    (gain,) = step(adascale, *sums([linear(first), linear(second)]))
    assert gain == pytest.approx(fairscale, **FAIRSCALE)
    assert gain == pytest.approx(exact, **EXACT)
    state = adascale.state_dict()
    assert state["var"] == pytest.approx([var], **EXACT)
    assert state["sqr"] == pytest.approx([sqr], **EXACT)


TWO_STEPS = [([-0.2, 3.3], [5.2, 0.7]), ([1, 4], [3.1, 0.1])]


@pytest.mark.parametrize(
    ("averaging", "smoothing", "exact"),
    [
        ("debiased", None, 1.67209693445),
        ("debiased", 0.998, 1.67209693445),
        ("mean", None, 1.67223432583),
        ("mean", 0.0, gain_ratio(19.62, 9, 2)),
    ],
)
def test_two_steps_are_averaged(averaging, smoothing, exact):
    adascale = AdaScale(averaging=averaging, smoothing=smoothing)
    for x in TWO_STEPS:
        (gain,) = step(adascale, *sums([linear(x[0]), linear(x[1])]))
    assert gain == pytest.approx(exact, **EXACT)
    if averaging == "debiased":
        assert gain == pytest.approx(1.6720968158031417, **FAIRSCALE)


def test_identical_gradients_gain_almost_nothing():
    gradient = linear([0, 1], bias=False)
    assert step(AdaScale(), *sums([gradient, gradient]))[0] == pytest.approx(1.0000002499999376, **EXACT)


@pytest.mark.parametrize("scale", [None, 4 / 3, 2.0, 4.0])
def test_gain_of_four_orthogonal_gradients_is_the_scale(scale):
    grads = [linear(x, bias=False) for x in np.eye(4)]
    assert step(AdaScale(scale), *sums(grads)) == ((4.0 if scale is None else scale),)


@pytest.mark.parametrize(("dimensions", "gain"), [(10, 3.49), (100, 3.82), (1000, 3.94)])
def test_clipped_samples_lower_the_gain_where_few_dimensions_are_noisy(dimensions, gain):
    """Four gradients of nothing but noise, whose true gain is 4: samples of mu^2 below 0 count as 0."""
    random, adascale, gains = np.random.default_rng(0), AdaScale(), []
    for _ in range(4000):
        grads = random.normal(size=(4, dimensions))
        gains += step(adascale, *sums(list(grads)))
    assert np.mean(gains[1000:]) == pytest.approx(gain, abs=0.03)


@pytest.mark.parametrize("steps", [1, 4])
def test_gain_of_orthogonal_gradients_stays_two(steps):
    adascale = AdaScale(averaging="debiased")
    for _ in range(steps):
        assert step(adascale, *sums([linear([0, 1], bias=False), linear([1, 0], bias=False)])) == (2.0,)


def after_two_orthogonal_gradients(**options):
    adascale = AdaScale(2, **options)
    assert step(adascale, *sums([linear([0, 1], bias=False), linear([1, 0], bias=False)])) == (2.0,)
    return adascale


@pytest.mark.parametrize(
    "n, fairscale", [(3, 2.141385737279438), (6, 2.9927880097754036), (9, 3.4461759591877312)]
)
def test_more_accumulation_has_fairscales_gain_after_fairscales_factor(n, fairscale):
    """fairscale multiplies the average of the variance by old scale / new scale; without that: the next test."""
    adascale = after_two_orthogonal_gradients(averaging="debiased")
    state = adascale.state_dict()
    adascale.load_state_dict(state | {"var": [state["var"][0] * 2 / n]})
    adascale.set_scale(n)
    assert step(adascale, *sums([linear([0, 1], bias=False) / n] * n))[0] == pytest.approx(
        fairscale, **FAIRSCALE
    )


@pytest.mark.parametrize("n", [3, 6, 9])
def test_more_accumulation_keeps_the_variance_of_the_baseline_batch(n):
    adascale = after_two_orthogonal_gradients(averaging="debiased")
    adascale.set_scale(n)
    (gain,) = step(adascale, *sums([linear([0, 1], bias=False) / n] * n))
    smoothing = [0.998, 1 - n / 1000]
    var = averaged([2, 1e-6], smoothing, "debiased")
    sqr = averaged([0, 2 / n**2], smoothing, "debiased")
    assert gain == pytest.approx(gain_ratio(var, sqr, n), **EXACT)


def layer_gradients(layers, x):
    """The gradient of each linear layer's weights and bias, flat, for the sum of the last one's outputs."""
    inputs = [np.array(x, np.float64)]
    for weight, bias in layers:
        inputs.append(weight @ inputs[-1] + bias)
    grads, upstream = [], np.ones_like(inputs[-1])
    for (weight, _), h in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        grads.append(np.concatenate([np.outer(upstream, h).ravel(), upstream]))
        upstream = weight.T @ upstream
    return grads[::-1]


def group_sums(layers):
    of_layers = list(zip(*(layer_gradients(layers, x) for x in ([1, 2], [3, 4])), strict=True))
    measured = [sums(grads) for grads in of_layers]
    return [np.mean(g, axis=0) for g in of_layers], (
        2,
        [m[1][0] for m in measured],
        [m[2][0] for m in measured],
    )


def descend(layers, means, gains):
    for (weight, bias), mean, gain in zip(layers, means, gains, strict=True):
        weight -= 0.1 * gain * mean[: weight.size].reshape(weight.shape)
        bias -= 0.1 * gain * mean[weight.size :]


@pytest.mark.parametrize(
    ("averaging", "per_group", "added"),
    [
        ("debiased", True, (1.1382937715383077, 1.142857206008338, 1.1116875516387468, 1.0749164095196344)),
        # fairscale divides the first sample of a new group by the number of steps, which only the sum notices
        ("mean", True, (None, 1.142857206006931, 1.1116906378271827, 1.0749164095196344)),
        ("mean", False, (1.1391959826562015, None, None, None)),
    ],
)
def test_added_groups_have_fairscales_gains(averaging, per_group, added):
    adascale = AdaScale(averaging=averaging, per_group=per_group)
    of_groups = AdaScale(per_group=True)
    layers = [
        (np.arange(1.0, 5).reshape(2, 2), np.full(2, 0.1)),
        (np.arange(1.0, 7).reshape(3, 2), np.full(3, 0.2)),
    ]
    means, measured = group_sums(layers)
    gains = step(adascale, *measured)
    assert adascale.gain == pytest.approx(1.1440223454935758, **FAIRSCALE)
    groups = (1.1428571428571428, 1.1471258476157762)
    assert gains == pytest.approx(groups if per_group else (adascale.gain,) * 2, **FAIRSCALE)
    descend(layers, means, step(of_groups, *measured))

    layers.append((np.tile(np.arange(1.0, 7), 2).reshape(4, 3), np.full(4, 0.2)))
    _, measured = group_sums(layers)
    gains = step(adascale, *measured)
    for got, wanted in zip((adascale.gain, *gains), added, strict=True):
        assert wanted is None or got == pytest.approx(wanted, **FAIRSCALE)
    assert per_group or gains == (adascale.gain,) * 3


@pytest.mark.parametrize(
    "scale, gains", [(1, (1, 1, 1, 1)), (2, (2, 2, 2, 1.5)), (4, (4, 4, 4, 2)), (10, (10, 10, 10, 2.5))]
)
def test_clipped_averages_have_adaptdls_gains(scale, gains):
    for var, sqr, gain in zip([1, 0, 0, 2], [-1, 0, -1, 1], gains, strict=True):
        assert Average(max(var, 1e-6), max(sqr, 0)).gain(scale) == pytest.approx(gain, **EXACT)


def test_two_steps_of_one_worker_have_adaptdls_gain():
    adascale = AdaScale()
    assert step(adascale, *sums([(3, 1), (1, 1)])) == (1.2,)
    assert (adascale.state_dict()["var"], adascale.state_dict()["sqr"]) == ([2.0], [4.0])


# --- the paper


def test_hand_example_of_four_gradients():
    adascale = AdaScale(4)
    assert step(adascale, *sums([(1, 0), (0, 1), (1, 1), (2, 0)])) == (1.6,)
    assert (adascale.gain, adascale.progress, adascale.gradient_noise_scale) == (1.6, 1.6, 1.0)
    state = adascale.state_dict()
    assert (state["var"], state["sqr"], state["samples"]) == ([1.0], [1.0], [1])
    assert state["weight"] == pytest.approx([1 - 0.996])


counts = st.integers(2, 6)
scales = st.one_of(st.none(), st.floats(1, 64))
averagings = st.sampled_from(["mean", "debiased"])
smoothings = st.one_of(st.none(), st.floats(0, 0.999))


@st.composite
def histories(draw):
    """Gradients of some steps, any number at each."""
    values = st.floats(-10, 10).map(lambda v: round(v, 3))
    size = draw(st.integers(1, 3))
    gradient = st.lists(values, min_size=size, max_size=size).map(np.array)
    return draw(st.lists(st.lists(gradient, min_size=2, max_size=5), min_size=1, max_size=5))


def wanted_gain(history, scale, averaging, smoothing):
    """By the definitions, from all steps so far."""
    scales = [scale or len(grads) for grads in history]
    samples = [baseline_sample(grads, s) for grads, s in zip(history, scales, strict=True)]
    windows = [s if averaging == "mean" else len(g) for g, s in zip(history, scales, strict=True)]
    smoothing = [max(1 - w / 1000, 0) if smoothing is None else smoothing for w in windows]
    var, sqr = (averaged(each, smoothing, averaging) for each in zip(*samples, strict=True))
    return gain_ratio(var, sqr, scales[-1])


@given(histories(), scales, averagings, smoothings)
def test_gain_is_that_of_the_definitions(history, scale, averaging, smoothing):
    assume(all(np.any(grads) for grads in history))
    adascale = AdaScale(scale, averaging=averaging, smoothing=smoothing)
    for t, grads in enumerate(history, 1):
        (gain,) = step(adascale, *sums(grads))
        assert gain == pytest.approx(wanted_gain(history[:t], scale, averaging, smoothing), rel=1e-9)


sums_of_squares = st.one_of(st.floats(0), st.sampled_from([0.0, 1e-30, 1.0, 1e308, math.inf, math.nan]))
measurements = st.tuples(
    counts, st.lists(st.tuples(sums_of_squares, sums_of_squares), min_size=3, max_size=3)
)


@given(st.lists(measurements, max_size=6), scales, averagings, smoothings, st.booleans())
@example([(2, [(1.7e308, 0.0)] * 3), (2, [(1.7e308, 8e307)] * 3)], 1.0, "mean", None, True)
def test_gains_are_between_one_and_the_scale_whatever_the_sums(steps, scale, averaging, smoothing, per_group):
    adascale = AdaScale(scale, averaging=averaging, smoothing=smoothing, per_group=per_group)
    most = 0.0
    for n, groups in steps:
        gains = step(adascale, n, [s for s, _ in groups], [m for _, m in groups])
        assert len(gains) == 3
        assert all(1 <= gain <= (scale or n) for gain in (*gains, adascale.gain))
        most += scale or n
    assert len(steps) <= adascale.progress <= most
    assert adascale.gradient_noise_scale >= 0
    assert all(map(math.isfinite, adascale.state_dict()["var"] + adascale.state_dict()["sqr"]))


@given(st.floats(1, 1e6), st.floats(1e-3, 1e6), counts)
def test_gain_is_the_scale_if_the_mean_is_no_longer_than_the_noise(scale, spread, n):
    mean = spread / n**2  # of orthogonal gradients of one length
    assert step(AdaScale(scale), n, [spread], [mean * (1 - 1e-12)]) == (scale,)


@given(st.floats(1, 1e6), st.floats(1, 1e6), counts)
def test_gain_is_one_if_the_gradients_agree(scale, mean, n):
    """But for the floor of the variance and the rounding of the sums."""
    (gain,) = step(AdaScale(scale), n, [n * mean], [mean])
    assert 1 <= gain <= 1 + 1.01e-6 / mean + 1e-15 * scale


@given(histories(), st.integers(-3, 20), averagings)
def test_gain_does_not_depend_on_the_gradients_unit(history, exponent, averaging):
    """Powers of two change no rounding; the floor of the variance must not be reached."""
    assume(all(baseline_sample(grads, len(grads))[0] > 1e-3 for grads in history))
    one, other = AdaScale(averaging=averaging), AdaScale(averaging=averaging)
    for grads in history:
        assert step(one, *sums(grads)) == step(other, *sums(np.array(grads) * 2.0**exponent))
    assert one.progress == other.progress
    assert one.gradient_noise_scale == other.gradient_noise_scale


@given(histories())
def test_common_gain_does_not_depend_on_how_elements_are_grouped(history):
    together, apart = AdaScale(), AdaScale()
    for grads in history:
        grads = np.array(grads).round()
        n, *whole = sums(grads)
        columns = [sums(column[:, None]) for column in grads.T]
        gains = step(apart, n, [c[1][0] for c in columns], [c[2][0] for c in columns])
        assert gains == pytest.approx(step(together, n, *whole) * grads.shape[1], **EXACT)


def test_a_long_run_goes_over_from_the_mean_to_the_exponential_average():
    adascale = AdaScale(250)  # 0.75, a mean of the first three
    samples = [(1.0, 2.0), (3.0, 1.0), (5.0, 5.0), (2.0, 9.0), (8.0, 0.5)]
    for t, (var, sqr) in enumerate(samples, 1):
        (gain,) = step(adascale, *expected_sums(4, var, sqr, 250))
        so_far = zip(*samples[:t], strict=True)
        assert gain == pytest.approx(
            gain_ratio(*(averaged(x, [0.75] * t, "mean") for x in so_far), 250), **EXACT
        )


@pytest.mark.parametrize("scale", [1000, 3000])
def test_nothing_is_averaged_from_scale_1000_on(scale):
    adascale = AdaScale(scale)
    step(adascale, *expected_sums(4, 9.0, 1.0, scale))
    assert step(adascale, *expected_sums(4, 1.0, 9.0, scale))[0] == pytest.approx(
        gain_ratio(1, 9, scale), **EXACT
    )


def test_gain_is_a_number_where_its_sums_would_overflow():
    assert Average(1e308, 1e308).gain(100) == pytest.approx(gain_ratio(1, 1, 100), **EXACT)
    _, spread, mean = expected_sums(2, 1e308, 8e307, 1000)
    adascale = AdaScale(1000, per_group=True)
    assert step(adascale, 2, spread * 3, mean * 3) == pytest.approx([gain_ratio(1, 0.8, 1000)] * 3, **EXACT)
    assert 1 <= adascale.gain <= 1000


def test_baseline_of_one_batch_gains_nothing():
    adascale = AdaScale(1)
    for _ in range(3):
        assert step(adascale, *sums([(3, 1), (-1, 4)])) == (1.0,)
    assert adascale.progress == 3


def test_groups_have_gains_of_their_own_if_asked():
    quiet, noisy = expected_sums(4, 1.0, 9.0, 4), expected_sums(4, 9.0, 1.0, 4)
    measured = 4, quiet[1] + noisy[1], quiet[2] + noisy[2]
    adascale = AdaScale(per_group=True)
    assert step(adascale, *measured) == pytest.approx([gain_ratio(1, 9, 4), gain_ratio(9, 1, 4)], **EXACT)
    assert adascale.gain == adascale.progress == pytest.approx(gain_ratio(10, 10, 4), **EXACT)
    assert step(AdaScale(), *measured) == pytest.approx([adascale.gain] * 2, **EXACT)


# --- what changes on the way


@pytest.mark.parametrize("averaging", ["mean", "debiased"])
@pytest.mark.parametrize("plan", [(32, 64, 128), (128, 64, 32)])
def test_new_scale_takes_effect_at_once_and_keeps_the_averages(plan, averaging):
    """The paper's elastic training: ever as many workers as baseline batches, of one and the same noise."""
    adascale = AdaScale(averaging=averaging)
    for scale in plan:
        adascale.set_scale(scale)
        for _ in range(3):
            (gain,) = step(adascale, *expected_sums(scale, 40.0, 2.0, scale))
            assert gain == pytest.approx(gain_ratio(40, 2, scale), **EXACT)


@pytest.mark.parametrize("averaging", ["mean", "debiased"])
def test_batch_may_come_as_any_number_of_gradients(averaging):
    adascale = AdaScale(8, averaging=averaging)
    for n in (8, 2, 4, 16, 3):
        (gain,) = step(adascale, *expected_sums(n, 5.0, 2.0, 8))
        assert gain == pytest.approx(gain_ratio(5, 2, 8), **EXACT)


def test_without_a_scale_the_number_of_gradients_is_taken():
    adascale = AdaScale()
    for n in (2, 7, 3):
        assert step(adascale, *expected_sums(n, 5.0, 2.0, n))[0] == pytest.approx(
            gain_ratio(5, 2, n), **EXACT
        )
    adascale.set_scale(6)
    assert step(adascale, *expected_sums(3, 5.0, 2.0, 6))[0] == pytest.approx(gain_ratio(5, 2, 6), **EXACT)


def test_step_that_does_not_happen_leaves_everything_untouched():
    adascale, twin = AdaScale(), AdaScale()
    for grads in ([(3, 1), (1, 1)], [(0, 1), (4, 0)]):
        before = adascale.state_dict()
        adascale.measure(*sums([(9, 9), (-9, 8), (7, 7)]))
        assert adascale.state_dict() == before
        assert step(adascale, *sums(grads)) == step(twin, *sums(grads))
    assert adascale.state_dict() == twin.state_dict()


def test_step_counts_once():
    adascale = AdaScale()
    proposal = adascale.measure(*sums([(3, 1), (1, 1)]))
    adascale.commit(proposal)
    with pytest.raises(xc.UsageError, match="measure again"):
        adascale.commit(proposal)
    assert adascale.progress == adascale.gain == 1.2


@pytest.mark.parametrize(
    "sums_of_squares",
    [(0.0, 0.0), (math.inf, 1.0), (math.inf, math.inf), (math.nan, math.nan), (1.0, math.nan)],
)
@pytest.mark.parametrize("per_group", [True, False])
def test_step_that_measures_nothing_has_the_gain_of_the_averages(sums_of_squares, per_group):
    spread, mean = sums_of_squares
    adascale = AdaScale(per_group=per_group)
    assert step(adascale, 2, [spread], [mean]) == (1.0,)
    assert step(adascale, *sums([(3, 1), (1, 1)])) == (1.2,)
    averages = adascale.state_dict()["var"]
    assert step(adascale, 2, [spread], [mean]) == (1.2,)
    assert adascale.state_dict()["var"] == averages
    assert adascale.progress == pytest.approx(3.4)


def test_noise_scale_is_that_of_the_averages():
    adascale = AdaScale(4)
    assert adascale.gradient_noise_scale == math.inf
    step(adascale, *expected_sums(4, 6.0, 0.0, 4))
    assert adascale.gradient_noise_scale == math.inf
    step(adascale, *expected_sums(4, 2.0, 1.0, 4))
    assert adascale.gradient_noise_scale == pytest.approx(4.0 / 0.5, **EXACT)


@pytest.mark.parametrize("inner_rate, ratio", [(0.2, 1.0416666666666667), (0.5, 4 / 3)])
def test_displaced_points_add_the_known_share_to_the_variance(inner_rate, ratio):
    """Worker k's gradient h (w - inner_rate g_k) + noise on a quadratic of curvature h = 1, about w = 0."""
    draws = np.random.RandomState(1)
    adascale, grads = AdaScale(1), np.zeros((64, 16))  # a baseline batch of all 64
    for _ in range(400):
        grads = -inner_rate * grads + draws.standard_normal(grads.shape)
        step(adascale, *sums(grads))
    assert adascale.state_dict()["var"][0] == pytest.approx(16 / 64 * ratio, rel=0.01)


# --- checkpoints


@given(histories(), histories(), scales, averagings, smoothings, st.booleans())
def test_loaded_estimator_continues_identically(first, then, scale, averaging, smoothing, per_group):
    options = {"averaging": averaging, "smoothing": smoothing, "per_group": per_group}
    adascale, loaded = AdaScale(scale, **options), AdaScale(scale, **options)
    for grads in first:
        step(adascale, *sums(grads))
    loaded.load_state_dict(json.loads(json.dumps(adascale.state_dict())))
    for grads in then:
        assert step(adascale, *sums(grads)) == step(loaded, *sums(grads))
    assert adascale.state_dict() == loaded.state_dict()
    assert (adascale.gain, adascale.progress) == (loaded.gain, loaded.progress)


def test_saved_state_goes_on_at_another_scale():
    adascale, larger = AdaScale(4), AdaScale(16)
    step(adascale, *expected_sums(4, 6.0, 2.0, 4))
    larger.load_state_dict(adascale.state_dict())
    assert step(larger, *expected_sums(16, 6.0, 2.0, 16))[0] == pytest.approx(gain_ratio(6, 2, 16), **EXACT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_group": True},
        {"var": [math.nan]},
        {"sqr": [-1.0]},
        {"samples": [math.inf]},
        {"weight": []},
        {"progress": "far"},
        {"gain": None},
        None,
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(wrong):
    adascale = AdaScale()
    step(adascale, *sums([(3, 1), (1, 1)]))
    before = adascale.state_dict()
    with pytest.raises(xc.UsageError):
        adascale.load_state_dict({} if wrong is None else before | wrong)
    assert adascale.state_dict() == before


# --- wrong arguments


@pytest.mark.parametrize("scale", [0, 0.99, -1, math.inf, math.nan, "many"])
def test_scale_must_be_finite_and_at_least_one(scale):
    with pytest.raises(xc.UsageError, match="scale must be"):
        AdaScale(scale)
    adascale = AdaScale(3)
    with pytest.raises(xc.UsageError, match="scale must be"):
        adascale.set_scale(scale)
    assert adascale.scale == 3


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": 1},
        {"smoothing": -0.1},
        {"smoothing": math.nan},
        {"smoothing": "x"},
        {"averaging": "ema"},
    ],
)
def test_averaging_must_be_one_that_exists(options):
    with pytest.raises(xc.UsageError, match=next(iter(options))):
        AdaScale(**options)


@pytest.mark.parametrize("n", [0, 1])
def test_one_gradient_is_too_few(n):
    with pytest.raises(xc.UsageError, match="at least two gradients per step: more workers, or"):
        AdaScale().measure(n, [1.0], [1.0])


def test_groups_cannot_vanish():
    adascale = AdaScale(per_group=True)
    step(adascale, 2, [1.0, 2.0], [0.5, 1.0])
    with pytest.raises(xc.UsageError, match="2 groups"):
        adascale.measure(2, [1.0], [0.5])
