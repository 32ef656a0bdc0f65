"""The walk over protobuf's wire format against what the onnx package reads."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_files import chain, graph

from penjing.container import wire
from penjing.container.damage import DamageError


def test_finds_what_onnx_finds():
    file = chain(np.ones((3, 4), np.float32), np.arange(5, dtype=np.int8))
    expected = [
        (t.name, t.data_type, tuple(t.dims), t.raw_data)
        for t in onnx.load_from_string(file).graph.initializer
    ]
    found = [
        (s.name, s.data_type, s.dims, file[s.start : s.start + s.size]) for s in wire.find(file)
    ]
    assert found == expected


def test_finds_packed_floats_constants_and_subgraphs():
    inner = helper.make_graph(
        [], "inner", [], [], [numpy_helper.from_array(np.ones(7, np.float32), "deep")]
    )
    constant = numpy_helper.from_array(np.ones(5, np.float32), "constant")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner),
    ]
    packed = helper.make_tensor("packed", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    spans = wire.find(graph([packed], nodes))
    assert sorted((s.name, s.size) for s in spans) == [
        ("constant", 20),
        ("deep", 28),
        ("deep", 28),
        ("packed", 12),
    ]


@given(st.lists(st.integers(0, 300), max_size=6))
def test_cut_and_fill_are_inverse(sizes):
    file = chain(*(np.arange(size, dtype=np.uint8) for size in sizes))
    spans = wire.find(file)
    skeleton = wire.cut(file, spans)
    assert len(skeleton) == len(file) - sum(sizes)
    assert wire.find_cut(skeleton, len(file)) == spans
    data = {span.start: file[span.start : span.start + span.size] for span in spans}
    assert wire.fill(skeleton, spans, data) == file


def test_external_data_are_refused():
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "far")
    tensor.data_location = TensorProto.EXTERNAL
    with pytest.raises(DamageError, match="'far' are in another file"):
        wire.find(graph([tensor]))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    try:
        wire.find(data)
    except DamageError as error:
        assert str(error)
