"""The trellis against Ungerboeck's code, a walk of its states, and what its sets must be."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import walk

from penjing.container import arithmetic, trellis
from penjing.container.contexts import coding_order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_grids_are_those_of_a_walk_of_the_states(rows, widths, seed):
    odd = np.random.default_rng(seed).integers(0, 2, (rows, sum(widths))).astype(np.uint8)
    path, found, start = trellis.Path(rows), [], 0
    for width in widths:
        found.append(path.follow(odd[:, start : start + width]))
        start += width
    for row in range(rows):
        state, expected = 0, []
        for parity in odd[row].tolist():
            expected.append(state & 1)
            state = trellis.step(state, parity)
        assert np.concatenate(found, axis=1)[row].tolist() == expected


def test_the_code_is_ungerboecks():
    """Its free distance squared, 10 (table I, 8 states), is that of two paths that part and meet."""
    ways = {(state, state): 0.0 for state in range(trellis.STATES)}
    met, gaps = np.inf, {}
    for a in range(trellis.STATES):
        for one, other in ((0, 1), (1, 0)):
            gaps[trellis.step(a, one), trellis.step(a, other)] = _squared(a & 1, a & 1, one, other)
    for _ in range(40):
        following: dict[tuple[int, int], float] = {}
        for (a, b), gap in gaps.items():
            for one in (0, 1):
                for other in (0, 1):
                    pair = trellis.step(a, one), trellis.step(b, other)
                    total = gap + _squared(a & 1, b & 1, one, other)
                    if pair in ways:
                        met = min(met, total)
                    elif total < following.get(pair, np.inf):
                        following[pair] = total
        gaps = following
    assert met == 10


def _squared(grid: int, other_grid: int, parity: int, other_parity: int) -> int:
    """Least squared distance of cosets of 4 whose places are grid + 2 * parity."""
    apart = (grid + 2 * parity - other_grid - 2 * other_parity) % 4
    return min(apart, 4 - apart) ** 2


def test_the_sets_hold_every_integer_once_and_zero_twice():
    sets = [trellis.values_of(one, -9, 9).tolist() for one in range(trellis.SETS)]
    assert sorted(itertools.chain(*sets)) == sorted([*range(-9, 10), 0])
    assert [0 in one for one in sets] == [True, False, True, False]
    for values in sets:
        assert values == [-value for value in reversed(values)]
        assert all(b - a in (2, 3, 4) for a, b in itertools.pairwise(values))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 15), st.sampled_from([1, 1, 4, 9, 25, 70])),
    st.floats(0.1, 40),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(shape, scale, seed):
    values = walk(shape, scale, np.random.default_rng(seed))
    symbols = (values.ravel() + 128).astype(np.uint8)
    if symbols.min() < symbols.max():
        centre = int(np.clip(128, symbols.min(), symbols.max()))
        coded, left = arithmetic.encode(symbols, shape, centre, "weights", {})
        decoded, same = arithmetic.decode(coded, shape, "weights", {})
        assert np.array_equal(decoded, symbols)
        assert all(np.array_equal(left[k][c], same[k][c]) for k in left for c in left[k])


@pytest.mark.parametrize("scale", [2.0, 15.0])
def test_walks_cost_what_their_grids_leave_open(scale):
    shape = (100, 500, 1)
    values = walk(shape, scale, np.random.default_rng(1))
    symbols = (values.ravel() + 128).astype(np.uint8)
    coded, _ = arithmetic.encode(symbols, shape, 128, "weights", {})
    assert coded[3] == arithmetic.DEPENDENT
    grids = trellis.Path(100).follow(trellis.parities(values[:, coding_order(shape)]))
    ideal = sum((grids == grid).mean() * _entropy(grid, scale) for grid in (0, 1))
    assert 0.99 * ideal < 8 * len(coded) / len(symbols) < 1.012 * ideal + 0.02


def _entropy(grid: int, scale: float) -> float:
    """Bits of a number from Laplace's law, rounded to the nearest on ``grid``."""
    allowed = np.union1d(*(trellis.values_of(2 * grid + p, -127, 127) for p in (0, 1)))
    edges = (allowed[1:] + allowed[:-1]) / 2
    below = np.where(edges < 0, np.exp(edges / scale) / 2, 1 - np.exp(-edges / scale) / 2)
    shares = np.diff(below, prepend=0, append=1)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())
