"""The integer conversions of the 16-bit types, on every value that can matter."""

import numpy as np
import pytest
from reference import assert_same_bits, rounded

from extrapcomm import _core

EVERY = np.arange(2**16, dtype=np.uint16)


def widen_float16(bits):
    return bits.view(np.float16).astype(np.float32)


def widen_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


TYPES = {
    "float16": (_core.f16_to_f32, _core.f32_to_f16, widen_float16),
    "bfloat16": (_core.bf16_to_f32, _core.f32_to_bf16, widen_bfloat16),
}


def around_every_tie(values):
    """Each finite value, the middle between it and the next, and the float32 neighbours of both."""
    values = np.unique(values[np.isfinite(values)]).astype(np.float64)
    ends = [2 * values[:1] - values[1:2], 2 * values[-1:] - values[-2:-1]]  # where overflow begins
    values = np.concatenate([ends[0], values, ends[1]])
    with np.errstate(over="ignore"):
        points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    return np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -np.float32(np.inf))]
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_widening_is_exact_for_all_values(dtype):
    widen, _, exact = TYPES[dtype]
    numbers = ~np.isnan(exact(EVERY))
    assert_same_bits(widen(EVERY)[numbers], exact(EVERY)[numbers])
    assert np.isnan(widen(EVERY)[~numbers]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_narrowing_undoes_widening(dtype):
    widen, narrow, exact = TYPES[dtype]
    numbers = EVERY[~np.isnan(exact(EVERY))]
    assert_same_bits(narrow(widen(numbers)), numbers)


@pytest.mark.parametrize("dtype", TYPES)
def test_narrowing_rounds_to_the_nearest_even(dtype):
    widen, narrow, exact = TYPES[dtype]
    random = np.random.RandomState(0).randint(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([around_every_tie(exact(EVERY)), random[~np.isnan(random)]])
    assert_same_bits(exact(narrow(values)), rounded(values, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_stays_nan(dtype):
    widen, narrow, _ = TYPES[dtype]
    patterns = np.uint32([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF])
    assert np.isnan(widen(narrow(patterns.view(np.float32)))).all()
