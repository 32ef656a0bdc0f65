"""Huffman's code against textbook lengths, Shannon's bounds and the tokens of bzip2."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.container import huffman
from penjing.container.damage import DamageError


def test_known_code_lengths():
    # The example of Cormen, Leiserson, Rivest and Stein, Introduction to Algorithms, 16.3.
    counts = np.array([45, 13, 12, 16, 9, 5])
    assert huffman.code_lengths(counts).tolist() == [1, 3, 3, 3, 4, 4]


def test_one_symbol_has_one_bit():
    assert huffman.code_lengths(np.array([0, 9, 0])).tolist() == [0, 1, 0]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(lambda c: sum(c) > max(c)))
def test_lengths_are_within_a_bit_of_the_entropy(counts):
    counts = np.array(counts)
    lengths = huffman.code_lengths(counts)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    mean = (counts * lengths).sum() / counts.sum()
    assert entropy - 1e-9 <= mean < entropy + 1
    assert sum(2.0 ** -int(length) for length in lengths[counts > 0]) == 1


def test_skewed_counts_stay_within_the_limit():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(np.array(fibonacci))
    assert lengths.max() == huffman.LONGEST
    assert sum(2.0 ** -int(length) for length in lengths) <= 1


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(1, 700)), min_size=1, max_size=40),
    st.integers(0, 255),
)
def test_round_trip(runs, centre):
    symbols = np.repeat(*np.array(runs).T).astype(np.uint8)
    decoded = huffman.decode(huffman.encode(symbols, centre), len(symbols))
    assert np.array_equal(decoded, symbols)


def test_round_trip_over_many_chunks():
    rng = np.random.default_rng(0)
    symbols = rng.binomial(40, 0.5, 300_000).astype(np.uint8)
    coded = huffman.encode(symbols, 20)
    assert np.array_equal(huffman.decode(coded, len(symbols)), symbols)


def test_sparse_symbols_cost_less_than_a_bit():
    rng = np.random.default_rng(0)
    symbols = (rng.random(100_000) < 0.05).astype(np.uint8)
    # The entropy is 0.286 bits; a Huffman code of single symbols cannot go below 1.
    assert 8 * len(huffman.encode(symbols, 0)) / len(symbols) < 0.34


def test_lengths_that_form_no_code_are_refused():
    symbols = np.array([1, 2, 3, 3], np.uint8)
    coded = bytearray(huffman.encode(symbols, 0))
    coded[7:9] = b"\x11\x11"
    with pytest.raises(DamageError, match="do not form a code"):
        huffman.decode(bytes(coded), 4)
