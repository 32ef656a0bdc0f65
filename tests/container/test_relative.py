"""Relative indices against the example of Deep Compression's figure 2, worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import chain

from penjing.container import format
from penjing.container.damage import DamageError
from penjing.container.planes import Content, element_type, relative

RELATIVE = relative.RELATIVE
INT8 = element_type(3)


def content(number: int) -> Content:
    return Content(INT8, (number,), (number,))


def split(values: list[int]) -> list[np.ndarray] | None:
    found = RELATIVE.split(np.array(values, np.int8).view(np.uint8), content(len(values)))
    return None if found is None else [plane.symbols for plane in found]


def join(stored: list[np.ndarray], number: int) -> list[int]:
    parts = iter(stored)
    return RELATIVE.join(content(number), lambda *_: next(parts)).view(np.int8).tolist()


def test_the_papers_figure_2(monkeypatch):
    """Values at 1, 4 and 15 with differences of 3 bits: 1, 3, 8 with a filler zero, 3."""
    monkeypatch.setattr(relative, "_FARTHEST", (8,))
    values = [0, 34, 0, 0, 9, *[0] * 10, 17]
    head, gaps, stored = split(values)
    assert head.tolist() == [128, 4, 0, 0, 0]
    assert gaps.tolist() == [1, 3, 8, 3]
    assert (stored.astype(int) - 128).tolist() == [34, 9, 0, 17]
    assert join([head, gaps, stored], 16) == values


def test_the_first_may_be_at_the_start():
    _, gaps, _ = split([5, 0, 0, 0, -1, 0, 0, 0])
    assert gaps.tolist() == [0, 4]


@pytest.mark.parametrize("distance", [31, 32, 33, 64, 65])
def test_distances_at_the_edge_of_five_bits(distance, monkeypatch):
    monkeypatch.setattr(relative, "_FARTHEST", (32,))
    values = [7, 0] * 20 + [7, *[0] * (distance - 1), 7, 0]
    head, gaps, stored = split(values)
    assert gaps.max() <= 32
    assert len(gaps) == 22 + (distance - 1) // 32
    assert join([head, gaps, stored], len(values)) == values


@pytest.mark.parametrize("distance", [253, 254, 255, 508, 509])
def test_distances_at_the_edge_of_a_byte(distance):
    values = [7, *[0] * (distance - 1), 7, 0]
    head, gaps, stored = split(values)
    assert len(gaps) == 2 + (distance - 1) // 254
    assert join([head, gaps, stored], len(values)) == values


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(-128, 127)), max_size=30),
    st.integers(0, 100),
)
def test_any_sparse_integers_come_back(parts, tail):
    values = [v for zeros, value in parts for v in (*[0] * zeros, value)] + [0] * tail
    planes_of = split(values) if values else None
    if planes_of is not None:
        assert join(planes_of, len(values)) == values


def test_sparse_layers_cost_near_their_entropy():
    rng = np.random.default_rng(0)
    weights = (rng.integers(1, 16, (300, 784)) * (rng.random((300, 784)) < 0.08)).astype(np.int8)
    file = chain(weights)
    coded = format.encode(file, "huffman")
    container = format.decode(coded)
    assert container.model() == file
    entropy = 0.08 * np.log2(15) - 0.08 * np.log2(0.08) - 0.92 * np.log2(0.92)
    assert len(coded) < 1.03 * entropy * weights.size / 8


@pytest.mark.parametrize("density", [0.02, 0.08, 0.15])
def test_the_longest_distance_is_the_one_that_takes_less(density, monkeypatch):
    rng = np.random.default_rng(0)
    weights = (rng.integers(1, 16, (200, 300)) * (rng.random((200, 300)) < density)).astype(np.int8)
    file = chain(weights)
    found = len(format.encode(file, "huffman"))
    alone = []
    for farthest in relative._FARTHEST:
        monkeypatch.setattr(relative, "_FARTHEST", (farthest,))
        alone.append(len(format.encode(file, "huffman")))
    assert alone[0] != alone[1]
    assert found == min(alone)


@pytest.mark.parametrize(
    ("head", "gaps"),
    [([0, 9, 0, 0, 0], []), ([0, 2, 0, 0, 0], [4, 9]), ([0, 2, 0, 0, 0], [4, 0])],
    ids=["more than there are", "outside", "twice the same"],
)
def test_damage_is_told(head, gaps):
    stored = [np.array(part, np.uint8) for part in (head, gaps, [1] * len(gaps))]
    with pytest.raises(DamageError):
        join(stored, 8)
