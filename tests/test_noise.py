"""Random numbers are a function of seed, step, worker and element, and of nothing else."""

import math

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import NOISES, assert_same_bits

import extrapcomm as xc

KINDS = sorted(NOISES)
MILLION = 1_000_000
ALL_ONES = 0xFFFFFFFF

# Counter, key and output of Philox4x32-10, as the Random123 library publishes them.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ALL_ONES] * 4, [ALL_ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

words = st.integers(0, ALL_ONES)
keys = st.tuples(st.integers(0, 2**64 - 1), words, words)  # seed, step, worker
elements = st.one_of(st.integers(0, 1000), st.integers(2**34 - 500, 2**34 + 500), st.integers(0, 2**62))


def noise(kind, seed=1, step=2, worker=3, first=0, count=MILLION):
    return xc._core.noise(kind, seed, step, worker, first, count)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert [int(word) for word in reference.philox(counter, key)] == answer


def test_the_first_numbers_without_a_key_are_made_of_the_first_answer():
    words = np.array(KNOWN_ANSWERS[0][2], np.uint32).view(np.int32)
    numbers = noise("uniform", seed=0, step=0, worker=0, count=4)
    np.testing.assert_array_equal(numbers, ((words >> 8) + 0.5) / 2**23)


@pytest.mark.parametrize("kind", KINDS)
@given(key=keys, first=elements, count=st.integers(0, 300))
def test_numbers_equal_the_reference_to_the_last_bit(kind, key, first, count):
    assert_same_bits(noise(kind, *key, first, count), reference.noise(kind, *key, first, count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_numbers_equal_the_reference_to_the_last_bit(kind):
    assert_same_bits(noise(kind), reference.noise(kind, 1, 2, 3, 0, MILLION))


@pytest.mark.parametrize("kind", KINDS)
@given(first=elements, count=st.integers(0, 500), cuts=st.lists(st.integers(0, 500), max_size=5))
def test_cutting_a_range_does_not_change_its_numbers(kind, first, count, cuts):
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = [noise(kind, first=first + a, count=b - a) for a, b in zip(edges, edges[1:], strict=False)]
    assert_same_bits(np.concatenate(parts), noise(kind, first=first, count=count))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_steps_and_workers_have_streams_of_their_own(kind):
    changes = [{}, {"seed": 2}, {"seed": 1 + 2**32}, {"step": 3}, {"worker": 4}, {"step": 3, "worker": 2},
               {"first": MILLION}, {"first": 2**34}]  # fmt: skip
    streams = np.array([noise(kind, **change, count=100_000) for change in changes], np.float64)
    correlations = np.corrcoef(streams) - np.eye(len(changes))
    assert np.abs(correlations).max() < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_numbers_are_uncorrelated(kind):
    numbers = noise(kind).astype(np.float64)
    for distance in (1, 2, 3, 4, 8):
        for values in (numbers, np.square(numbers)):
            correlation = np.corrcoef(values[:-distance], values[distance:])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(MILLION)


def normal_distribution(x):
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


# Second and fourth moment, their sampling errors times the root of the number of samples, distribution.
SHAPES = {
    "gaussian": (1, 3, math.sqrt(2), math.sqrt(96), normal_distribution),
    "uniform": (1 / 3, 1 / 5, math.sqrt(4 / 45), math.sqrt(1 / 9 - 1 / 25), lambda x: (x + 1) / 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_distribution(kind):
    numbers = noise(kind).astype(np.float64)
    second, fourth, spread_of_second, spread_of_fourth, _ = SHAPES[kind]
    bound = 4 / math.sqrt(MILLION)
    assert abs(numbers.mean()) < bound * math.sqrt(second)
    assert abs(np.mean(numbers**3)) < bound * math.sqrt({"gaussian": 15, "uniform": 1 / 7}[kind])
    assert abs(np.mean(numbers**2) - second) < bound * spread_of_second
    assert abs(np.mean(numbers**4) - fourth) < bound * spread_of_fourth


@pytest.mark.parametrize("kind", KINDS)
def test_the_kolmogorov_distance_is_within_its_bound(kind):
    numbers = np.sort(noise(kind).astype(np.float64))
    below = SHAPES[kind][-1](numbers)
    steps = np.arange(MILLION + 1) / MILLION
    distance = max(np.max(steps[1:] - below), np.max(below - steps[:-1]))
    assert distance < 1.95 / math.sqrt(MILLION)  # exceeded by one sample in a thousand


def test_extreme_words_give_numbers_inside_their_bounds():
    extremes = [0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1]
    grid = [np.array(word, np.uint64) for word in np.meshgrid(*[extremes] * 4)]
    assert np.abs(reference.gaussian_of(grid)).max() < math.sqrt(48 * math.log(2)) + 1e-6
    assert np.abs(reference.uniform_of(grid)).max() == 1 - 2**-24


def test_the_elementary_functions_are_close_to_numpy():
    u = np.linspace(2**-24, 1 - 2**-24, 100_001, dtype=np.float32)
    np.testing.assert_allclose(reference.log_of(u), np.log(u.astype(np.float64)), rtol=1.3e-7)
    turn = 2 * np.pi * u.astype(np.float64)
    sine, cosine = reference.sine_cosine_of_turn(u)
    np.testing.assert_allclose(sine, np.sin(turn), rtol=2.4e-7, atol=1e-15)
    np.testing.assert_allclose(cosine, np.cos(turn), rtol=2.4e-7, atol=1e-15)


def test_wrong_arguments_are_usage_errors():
    with pytest.raises(xc.UsageError, match="choose 'gaussian' or 'uniform'"):
        noise("pink")
    with pytest.raises(xc.UsageError, match="must not be negative"):
        noise("uniform", first=-1)
    with pytest.raises(xc.UsageError, match="must not be negative"):
        noise("uniform", count=-1)
