"""Graphs in their short form, and the coder that mixes what followed before."""

import math
import time
import zlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_files import graph

from penjing.container import format, lengths, mixing, wire
from penjing.container.damage import DamageError
from penjing.container.streams import compress_skeleton


def small_net(*, kernel: int = 5) -> bytes:
    """A convolution with weights, a pooling and a constant inside an attribute."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], kernel_shape=[kernel, kernel]),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(np.arange(3.0), "inner")
        ),
        helper.make_node("Softmax", ["b"], ["y0"], axis=-1),
    ]
    weights = np.random.default_rng(0).normal(size=(8, 1, kernel, kernel)).astype(np.float32)
    return graph([numpy_helper.from_array(weights, "w")], nodes)


def parts(file: bytes) -> tuple[bytes, int]:
    return wire.cut(file, wire.find(file)), len(file)


def test_the_short_form_gives_the_graph_and_the_size_back():
    skeleton, size = parts(small_net())
    short = lengths.shorten(skeleton, size)
    assert short is not None and len(short) < len(skeleton)
    assert lengths.lengthen(short) == (skeleton, size)


def test_the_short_form_says_nothing_of_the_data():
    """Two nets whose weights have other shapes: only the dimensions differ, byte by byte."""
    first, second = (lengths.shorten(*parts(small_net(kernel=kernel))) for kernel in (3, 5))
    assert len(first) == len(second)
    different = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert different == [(3, 5)] * 4  # kernel_shape and dims


def test_subgraphs_and_functions_have_a_short_form():
    value = numpy_helper.from_array(np.ones((2, 3), np.int8), "deep")
    inner = helper.make_graph([], "g", [], [], [value])
    branch = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
    model = onnx.load_from_string(graph([value], [branch]))
    model.functions.append(
        helper.make_function(
            "d", "f", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [], attributes=["a"]
        )
    )
    skeleton, size = parts(model.SerializeToString())
    assert lengths.lengthen(lengths.shorten(skeleton, size)) == (skeleton, size)


def test_what_is_written_in_another_way_has_no_short_form():
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], raw_data=bytes(8))
    assert lengths.shorten(*parts(graph([tensor]))) is None  # not the bytes of three floats
    skeleton, size = parts(small_net())
    at = skeleton.index(b"\x3a")  # the graph's key, then its length in two bytes
    assert skeleton[at + 1] & 0x80 and not skeleton[at + 2] & 0x80
    longer = skeleton[: at + 2] + bytes([skeleton[at + 2] | 0x80, 0]) + skeleton[at + 3 :]
    assert lengths.shorten(longer, size + 1) is None


def test_graphs_are_mixed_where_that_is_a_part_of_the_file_to_speak_of():
    rng = np.random.default_rng(0)
    coders = []
    for number in (1000, 1_000_000):
        weights = numpy_helper.from_array(rng.integers(0, 256, number).astype(np.uint8), "w")
        coders.append(format.decode(format.encode(graph([weights]), "arithmetic")).skeleton_coder)
    assert coders == ["mixed", "lzma"]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_lengthened_or_refused(data):
    try:
        skeleton, size = lengths.lengthen(data)
    except DamageError:
        return
    assert len(skeleton) <= size


def test_many_nested_messages_are_refused():
    with pytest.raises(DamageError, match="nested too deeply"):
        lengths.lengthen(b"\x3a" + b"\x0a\x2a\x32" * 99)


def test_large_dimensions_are_refused_at_once():
    dims = b"\x08" + b"\xff" * 8 + b"\x7f"
    begun = time.process_time()
    with pytest.raises(DamageError, match="dimensions"):
        lengths.lengthen(b"\x3a\x2a" + dims * 800 + b"\x10\x01\x4a")
    assert time.process_time() - begun < 10


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.binary(min_size=1, max_size=3).map(lambda one: one * 90))
def test_mixing_is_undone(data):
    assert mixing.decompress(mixing.compress(data), len(data)) == data


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200))
def test_mixing_reads_any_bytes(data, size):
    assert len(mixing.decompress(data, size)) == size


def test_probabilities_are_those_of_every_machine():
    """They come from logarithms and powers, which differ in the last digit from machine to machine."""
    squashed = [65536 / (1 + math.exp(-x / 256)) for x in range(-2047, 2048)]
    stretched = [256 * math.log((p + 0.5) / (4095.5 - p)) for p in range(4096)]
    assert min(abs(x % 1 - 0.5) for x in squashed + stretched) > 1e-5
    assert [round(x) for x in squashed] == mixing._SQUASHED
    assert [round(x) for x in stretched] == mixing._STRETCHED


def test_mixing_is_part_of_the_format():
    """A change of the phrases or of the model makes files unreadable."""
    assert (len(mixing.PHRASES), zlib.crc32(mixing.PHRASES)) == (3853, 1095657360)
    short = lengths.shorten(*parts(small_net()))
    assert zlib.crc32(mixing.compress(short)) == 4084904501


def test_a_graph_of_a_small_net_takes_few_bytes():
    file = small_net()
    skeleton, size = parts(file)
    coded = mixing.compress(lengths.shorten(skeleton, size))
    assert len(coded) < 0.6 * len(compress_skeleton(skeleton))
    packed = format.encode(file, "arithmetic")
    assert packed[4 + 1 + 2 + 8] == 2 and coded in packed


def test_random_bytes_hardly_grow():
    data = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8).tobytes()
    assert len(mixing.compress(data)) < 1.1 * len(data)


def test_what_often_follows_costs_next_to_nothing():
    """The best that is possible of n equal bytes after the first few is the chance of others."""
    data = b"penjing: " * 100
    assert len(mixing.compress(data)) < 20


def test_larger_graphs_are_not_mixed():
    """It takes a second for 8 KiB; a graph that declares more is refused before it is read."""
    many = [helper.make_node("Relu", [f"name{i:04}"], [f"name{i + 1:04}"]) for i in range(600)]
    packed = format.encode(graph([], many), "arithmetic")
    assert packed[:5] == b"PNJG\x02" and packed[5 + 3 + 8] != 2
    size = format.number(20_000)
    hostile = b"PNJG\x02" + size + bytes(8) + b"\x02" + size + b"\x01\x00"
    with pytest.raises(DamageError, match="larger than it can be"):
        format.decode(hostile)
