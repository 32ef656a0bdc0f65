"""The adaptive arithmetic coder against round trips and entropies known in closed form."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import walk

from penjing.container import arithmetic
from penjing.container.contexts import coding_order
from penjing.container.damage import DamageError


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


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 1, 2, 9, 25, 70])),
        st.tuples(st.integers(1, 40), st.integers(4, 12).map(lambda n: 8 * n), st.just(1)),
    ),
    st.integers(0, 255),
    st.floats(0.05, 120),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(shape, centre, scale, zeros, seed):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(shape) < zeros, 0, rng.laplace(0, scale, shape)) + centre
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


def in_runs(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Where a tenth of a matrix lies, in runs of eight columns."""
    return np.repeat(rng.random((rows, columns // 8)) < 0.1, 8, 1)


@pytest.mark.parametrize(("rows", "columns"), [(200, 64), (5000, 256)])
def test_numbers_near_one_another_cost_less(rows, columns):
    rng = np.random.default_rng(5)
    runs = in_runs(rows, columns, rng)
    symbols = (np.where(runs, rng.integers(-9, 10, runs.shape), 0) + 128).astype(np.uint8)
    elsewhere = symbols[:, rng.permutation(columns)]
    near, far = (bits(one.ravel(), (rows, columns, 1), 128) for one in (symbols, elsewhere))
    # Places are to be said of whole runs: of an eighth as many.
    places, values = entropy(runs.astype(np.uint8).ravel()), runs.mean() * np.log2(19)
    assert places / 8 + 0.9 * values < near < 0.6 * places + values
    # Elsewhere, only how many there are in a row tells something of where they are.
    per_row = np.bincount(runs.sum(1)) / rows
    told = entropy(runs.sum(1).astype(np.uint8)) / columns
    within = sum(
        share * -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        for number, share in enumerate(per_row)
        if 0 < (p := number / columns) < 1
    )
    assert far > 0.9 * (told + within + values)


def test_those_that_follow_the_trellis_do_so_too():
    rng = np.random.default_rng(8)
    symbols = walk((300, 64, 1), 3.0 * in_runs(300, 64, rng), rng) + 128
    elsewhere = walk((300, 64, 1), 3.0 * in_runs(300, 64, rng)[:, rng.permutation(64)], rng) + 128
    near, far = (
        bits(one.astype(np.uint8).ravel(), (300, 64, 1), 128) for one in (symbols, elsewhere)
    )
    assert near < 0.8 * far
    coded, _ = arithmetic.encode(symbols.astype(np.uint8).ravel(), (300, 64, 1), 128, "weights", {})
    assert coded[3] == arithmetic.DEPENDENT + arithmetic.EIGHTS


@pytest.mark.parametrize("shape", [(300, 300, 1), (100, 100, 9)])
def test_numbers_among_zeros_cost_what_their_own_sizes_leave_open(shape):
    """Few large numbers in half of the rows, many small ones in the others: their mean is the same."""
    rng = np.random.default_rng(9)
    many = rng.random((shape[0], 1, 1)) < 0.5
    there = rng.random(shape) < np.where(many, 0.3, 0.02)
    signed = np.where(many, 2, 30) * rng.choice([-1, 1], shape)
    symbols = (np.where(there, signed, 0) + 128).astype(np.uint8)
    kinds = [symbols[many.ravel() == one].ravel() for one in (False, True)]
    ideal = sum(len(kind) * entropy(kind) for kind in kinds) / symbols.size
    assert 0.99 * ideal < bits(symbols.ravel(), shape, 128) < 1.12 * ideal
    coded, _ = arithmetic.encode(symbols.ravel(), shape, 128, "weights", {})
    assert coded[3] == arithmetic.SPARSE


@given(st.integers(4, 3000))
def test_eights_keep_the_order(eights):
    assert np.array_equal(coding_order((1, 8 * eights, 1)), coding_order((1, eights, 8)))


@pytest.mark.parametrize("shape", [(3, 24, 1), (3, 36, 1), (3, 8, 5)])
def test_eights_are_refused_where_a_plane_has_none(shape):
    symbols = np.random.default_rng(7).integers(0, 9, math.prod(shape)).astype(np.uint8)
    coded, _ = arithmetic.encode(symbols, shape, 4, "weights", {})
    wrong = coded[:3] + bytes([coded[3] + arithmetic.EIGHTS]) + coded[4:]
    with pytest.raises(DamageError, match="wrong form"):
        arithmetic.decode(wrong, shape, "weights", {})


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


@pytest.mark.parametrize("form", range(4))
def test_a_plane_without_symbols_is_refused(form):
    with pytest.raises(DamageError, match="no valid range"):
        arithmetic.decode(bytes([3, 5, 4, form]), (0, 1, 1), "weights", {})
