"""Floats on a grid: any tensors come back, and rounded ones cost what their integers do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx_files import chain, graph

from penjing.container import format
from penjing.container.damage import DamageError
from penjing.container.planes import Content, element_type
from penjing.container.planes.grid import GRID

TYPES = {"<f2": 10, "<f4": 1, "<f8": 11}


def content(tensors: list[np.ndarray]) -> Content:
    kind = element_type(TYPES[tensors[0].dtype.str])
    return Content(kind, (sum(map(len, tensors)),), tuple(one.nbytes for one in tensors))


def split(tensors: list[np.ndarray]) -> list[np.ndarray] | None:
    found = GRID.split(np.concatenate(tensors).view(np.uint8), content(tensors))
    return None if found is None else [plane.symbols for plane in found]


def join(stored: list[np.ndarray], tensors: list[np.ndarray]) -> bytes:
    parts = iter(stored)
    return GRID.join(content(tensors), lambda *_: next(parts)).tobytes()


def test_integers_and_exponents_of_each_tensor():
    tensors = [np.array(v, np.float32) for v in ([0.75, -1.5, 0], [96, 64], [0.1, 0.5], [0, 0])]
    exponents, integers, *others = split(tensors)
    assert (exponents.astype(int) - 128).tolist() == [-2, 5, -128, -7]
    assert (integers.astype(int) - 128).tolist() == [3, -6, 0, 3, 2, 0, 0]
    assert [len(plane) for plane in others] == [2, 2, 2, 2]


@pytest.mark.parametrize(("largest", "is_one"), [(127, True), (128, True), (129, False)])
def test_integers_have_seven_bits_and_a_sign(largest, is_one):
    tensor = np.array([largest, -1 if largest % 2 else -2, 4], np.float32)
    assert (split([tensor]) is not None) == is_one


@pytest.mark.parametrize("odd", [-0.0, np.nan, np.inf, 2.0**-126 / 2**20])
def test_what_is_no_integer_keeps_its_tensor_off_the_grid(odd):
    with_odd = np.array([1, odd], np.float32)
    assert split([with_odd]) is None
    found = split([with_odd, np.array([3], np.float32)])
    assert found[0].tolist() == [0, 128]
    assert join(found, [with_odd, np.zeros(1, np.float32)])[:8] == with_odd.tobytes()


@settings(deadline=None)
@given(
    st.sampled_from(sorted(TYPES)),
    st.lists(
        st.tuples(st.integers(-20, 20), st.lists(st.integers(-140, 140), min_size=1, max_size=9)),
        min_size=1,
        max_size=6,
    ),
)
def test_any_tensors_come_back(kind, parts):
    with np.errstate(over="ignore"):
        tensors = [np.ldexp(np.array(k, float), power).astype(kind) for power, k in parts]
    found = split(tensors)
    if found is None:
        assert all(np.abs(k).max() > 127 for power, k in parts if power >= -10 and kind != "<f2")
    else:
        assert join(found, tensors) == b"".join(one.tobytes() for one in tensors)


def test_rounded_biases_cost_little_more_than_the_entropy_of_their_integers():
    rng = np.random.default_rng(0)
    integers = rng.normal(0, 6, (4, 200)).round() + 0.0
    biases = [(one / 2 ** (4 + i)).astype(np.float32) for i, one in enumerate(integers)]
    seen = np.unique(integers, return_counts=True)[1] / integers.size
    entropy = -(seen * np.log2(seen)).sum() * integers.size / 8
    file = chain(*biases)
    decoded = format.decode(format.encode(file, "arithmetic"))
    assert decoded.model() == file
    (stream,) = decoded.streams
    assert stream.decoded.view == "grid"
    assert stream.coded_bytes < 1.1 * entropy + 40


def test_tensors_that_end_inside_an_element_are_packed_all_the_same():
    """Six bytes each of float32: together they are three elements."""
    broken = [
        TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], raw_data=bytes(6))
        for name in ("a", "b")
    ]
    file = graph(broken)
    assert format.decode(format.encode(file, "arithmetic")).model() == file


def test_another_type_is_damage():
    integers = Content(element_type(6), (2,), (8,))
    with pytest.raises(DamageError):
        GRID.join(integers, lambda shape: np.zeros(shape[0], np.uint8))
