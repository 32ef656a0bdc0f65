"""The adaptive arithmetic coder against round trips and entropies known in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.container import arithmetic


def bits(symbols: np.ndarray, shape, centre: int) -> float:
    """Bits a symbol, after checking the round trip."""
    coded, left = arithmetic.encode(symbols, shape, centre, "weights", {})
    decoded, same = arithmetic.decode(coded, shape, "weights", {})
    assert np.array_equal(decoded, symbols)
    assert left.keys() == same.keys()
    for key in left:
        assert left[key].keys() == same[key].keys()
        assert all(np.array_equal(left[key][at], same[key][at]) for at in left[key])
    return 8 * len(coded) / len(symbols)


def entropy(symbols: np.ndarray) -> float:
    shares = np.bincount(symbols) / len(symbols)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 1, 2, 9, 25, 70])),
    st.integers(0, 255),
    st.floats(0.05, 120),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(shape, centre, scale, seed):
    values = np.random.default_rng(seed).laplace(0, scale, shape) + centre
    symbols = np.clip(np.rint(values), 0, 255).astype(np.uint8).ravel()
    if symbols.min() < symbols.max():
        inside = int(np.clip(centre, symbols.min(), symbols.max()))
        bits(symbols, shape, inside)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 15.0])
@pytest.mark.parametrize("shape", [(200, 500, 1), (100, 112, 9)])
def test_independent_symbols_cost_their_entropy(shape, scale):
    rng = np.random.default_rng(1)
    values = np.clip(np.rint(rng.laplace(0, scale, shape)), -127, 127)
    symbols = (values + 128).astype(np.uint8).ravel()
    assert bits(symbols, shape, 128) < 1.012 * entropy(symbols) + 0.003


def test_rows_and_columns_of_different_scale_cost_less_than_one_histogram():
    rng = np.random.default_rng(2)
    scales = np.exp(rng.normal(0, 1, (256, 1))) * np.exp(rng.normal(0, 1, (1, 400)))
    values = np.clip(np.rint(rng.laplace(0, 2 * scales)), -127, 127)
    symbols = (values + 128).astype(np.uint8).ravel()
    # What an ideal coder that knew every scale would need.
    odds = np.exp(-np.abs(np.arange(-127, 128)) / (2 * scales[..., None]))
    odds = np.take_along_axis(
        odds / odds.sum(-1, keepdims=True), (values + 127).astype(int)[..., None], 2
    )
    ideal = float(-np.log2(odds).mean())
    assert ideal < bits(symbols, (256, 400, 1), 128) < ideal + 0.2 < entropy(symbols) - 0.4


@pytest.mark.parametrize("step", [0.02, 0.5])
def test_smooth_kernels_cost_less(step):
    # Neighbours correlate by 0.9; the coefficients are learned from the rows before.
    rng = np.random.default_rng(3)
    values = rng.normal(0, 1, (256, 64, 3, 3))
    for axis in (2, 3):
        moved = np.moveaxis(values, axis, 0)
        for index in (1, 2):
            moved[index] = 0.9 * moved[index - 1] + np.sqrt(1 - 0.81) * moved[index]
    symbols = (np.clip(np.rint(values / step), -127, 127) + 128).astype(np.uint8).ravel()
    # Eight of nine values have a variance of 0.19 or 0.19 ** 2 given the others: at most 1.6 bits.
    gained = entropy(symbols) - bits(symbols, (256, 64, 9), 128)
    assert (1.25 if step == 0.02 else 0.8) < gained < 1.6


def test_what_a_tensor_teaches_makes_the_next_smaller():
    rng = np.random.default_rng(4)
    first, second = (rng.choice(256, 3000, p=_odd_law()).astype(np.uint8) for _ in range(2))
    alone, _ = arithmetic.encode(second, (3000, 1, 1), 128, "weights", {})
    _, left = arithmetic.encode(first, (3000, 1, 1), 128, "weights", {})
    after, _ = arithmetic.encode(second, (3000, 1, 1), 128, "weights", left)
    assert len(after) < len(alone)


def _odd_law() -> np.ndarray:
    """A law far from Laplace's: only every fifth symbol near the centre."""
    law = np.zeros(256)
    law[108:150:5] = 1
    return law / law.sum()
