"""One tensor of a file against what the onnx package reads from the unpacked one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import chain, graph, quantized

from penjing.container import format, inspect, pack, read_tensor, streams, unpack
from penjing.errors import PenjingError

CODERS = ("arithmetic", "huffman")


def packed(file: bytes, folder: Path, coder="arithmetic") -> Path:
    (folder / "model.onnx").write_bytes(file)
    pack(folder / "model.onnx", folder / "model.penjing", coder)
    return folder / "model.penjing"


def mixed() -> bytes:
    """Tensors in every view and of every size class, in a file that is not one block."""
    rng = np.random.default_rng(0)
    dense = rng.normal(0, 0.05, (16, 8, 3, 3)).astype(np.float32)
    arrays = [
        rng.laplace(0, 4, (16, 8, 3, 3)).astype(np.int8),
        dense,
        np.where(np.abs(dense) > 0.08, dense, 0),
        np.float32([-0.3, -0.1, 0, 0.1, 0.4])[rng.integers(0, 5, (32, 40))],
        rng.laplace(0, 9, (64, 64)).astype(np.int8),
        rng.normal(0, 1, (40, 50)).astype(np.float16),
        rng.integers(-9999, 9999, 64).astype(np.int32),
        rng.integers(0, 2, (2, 3)).astype(bool),
        rng.normal(0, 1, (3, 2)).astype(np.complex64),
        np.float64(2.5),
        rng.laplace(0, 3, (20, 60)).astype(np.int8),
    ]
    return chain(*map(np.asarray, arrays))


@pytest.mark.parametrize("coder", CODERS)
def test_every_tensor_equals_that_of_the_unpacked_file(coder, tmp_path):
    source = packed(mixed(), tmp_path, coder)
    unpack(source, tmp_path / "back.onnx")
    tensors = onnx.load(tmp_path / "back.onnx").graph.initializer
    assert any("sparse" in tensor.coder for tensor in inspect(source).tensors)
    for tensor in tensors:
        expected = numpy_helper.to_array(tensor)
        for out in (None, np.full(expected.shape, 1, expected.dtype)):
            found = read_tensor(source, tensor.name, out)
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected)
            assert found.flags.writeable
            assert out is None or found is out


def test_of_one_block(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    source = packed(chain(array, array, array[::-1]), tmp_path)
    assert inspect(source).tensors[0].coded_bytes is None
    assert np.array_equal(read_tensor(source, "w2"), array[::-1])
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    with pytest.raises(PenjingError, match=r"model\.penjing cannot be read"):
        read_tensor(source, "w2")


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT2", "UINT2"])
@pytest.mark.parametrize("count", [3, 2001])
def test_narrow_integers_have_a_byte_each(kind, count, tmp_path):
    bits = int(kind[-1])
    low = -(2 ** (bits - 1)) if kind[0] == "I" else 0
    values = np.random.default_rng(0).integers(low, low + 2**bits, count)
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [count], values)
    raw = numpy_helper.to_array(tensor)
    tensor = numpy_helper.from_array(raw, "w")
    found = read_tensor(packed(graph([tensor]), tmp_path), "w")
    assert found.dtype == (np.int8 if kind[0] == "I" else np.uint8)
    assert found.tolist() == values.tolist()


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN"])
def test_floats_that_numpy_lacks_are_their_bits(kind, tmp_path):
    size = 2 if kind == "BFLOAT16" else 1
    raw = np.random.default_rng(0).integers(0, 99, 300 * size).astype(np.uint8)
    tensor = TensorProto(
        name="w", data_type=getattr(TensorProto, kind), dims=[30, 10], raw_data=raw.tobytes()
    )
    found = read_tensor(packed(graph([tensor]), tmp_path), "w")
    assert found.shape == (30, 10)
    assert found.tobytes() == raw.tobytes()


def test_only_what_the_tensor_depends_on_is_decoded(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = [rng.laplace(0, 3, (40, 40)) for _ in range(5)]
    types = (np.int8, np.float16, np.int8, np.float16, np.int8)
    file = chain(*(a.astype(t) for a, t in zip(arrays, types, strict=True)))
    decoded = []
    decode = streams.decode
    monkeypatch.setattr(
        streams, "decode", lambda coded, *rest: decoded.append(coded) or decode(coded, *rest)
    )
    for coder, number in (("arithmetic", 2), ("huffman", 1)):
        decoded.clear()
        read_tensor(packed(file, tmp_path, coder), "w2")
        assert [coded.content.type.name for coded in decoded] == ["int8"] * number


def test_a_wrong_name_is_answered_with_near_ones(tmp_path):
    rng = np.random.default_rng(0)
    source = packed(quantized(rng, (16, 3, 3, 3), (10, 32)), tmp_path)
    with pytest.raises(PenjingError, match=r"no coded tensor named 'layer1\.wieght'.*'layer1\.w"):
        read_tensor(source, "layer1.wieght")
    with pytest.raises(PenjingError, match="cannot be read"):
        read_tensor(tmp_path / "missing.penjing", "w")
    with pytest.raises(PenjingError, match="near names are none"):
        read_tensor(packed(graph([]), tmp_path), "w")


def test_a_name_that_two_graphs_use_is_refused(tmp_path):
    tensor = numpy_helper.from_array(np.ones(7, np.float32), "deep")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    branches = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
    source = packed(graph([], [branches]), tmp_path)
    with pytest.raises(PenjingError, match="has 2 tensors named 'deep'"):
        read_tensor(source, "deep")


def test_a_buffer_that_does_not_fit_is_refused(tmp_path):
    source = packed(chain(np.ones((4, 5), np.float32)), tmp_path)
    fixed = np.zeros((4, 5), np.float32)
    fixed.flags.writeable = False
    for out, message in (
        (np.zeros((5, 4), np.float32), r"must be float32 \[4, 5\], not float32 \[5, 4\]"),
        (np.zeros((4, 5)), r"not float64 \[4, 5\]; make it with numpy\.empty"),
        (fixed, "that can be written"),
        (bytearray(80), "must be a NumPy array"),
    ):
        with pytest.raises(PenjingError, match=message):
            read_tensor(source, "w0", out)
    strided = np.zeros((4, 10), np.float32)[:, ::2]
    assert read_tensor(source, "w0", strided).sum() == 20


def test_a_shape_that_does_not_fit_the_bytes_is_refused(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], raw_data=bytes(8))
    with pytest.raises(PenjingError, match="'w' has another number of bytes than its shape"):
        read_tensor(packed(graph([tensor]), tmp_path), "w")


@pytest.mark.parametrize("coder", CODERS)
def test_damage_in_the_tensor_is_noticed_and_elsewhere_does_no_harm(coder, tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.laplace(0, 4, (2, 60, 60)).astype(np.int8)
    source = packed(chain(first, second), tmp_path, coder)
    data = bytearray(source.read_bytes())
    data[-12] ^= 1  # in the last tensor's code, before its checksum
    source.write_bytes(data)
    assert np.array_equal(read_tensor(source, "w0"), first)
    out = np.zeros_like(second)
    with pytest.raises(PenjingError, match=r"model\.penjing cannot be read"):
        read_tensor(source, "w1", out)
    assert not out.any()


def test_damage_in_the_graph_is_noticed(tmp_path):
    """Names and shapes have no checksum of their own: the tensor's covers them."""
    rng = np.random.default_rng(0)
    file = chain(rng.laplace(0, 4, (60, 40)).astype(np.int8))
    other = file.replace(b"\x08\x3c\x08\x28", b"\x08\x28\x08\x3c")  # dims [40, 60]
    assert len(other) == len(file) != 0 and other != file
    data, changed = format.encode(file, "huffman"), format.encode(other, "huffman")
    head = len(format.MAGIC) + 1 + 2 + 8 + 1
    size = len(data) - format.decode(data).streams[0].coded_bytes
    assert size == len(changed) - format.decode(changed).streams[0].coded_bytes
    source = tmp_path / "x.penjing"
    source.write_bytes(data[:head] + changed[head:size] + data[size:])
    with pytest.raises(PenjingError, match="'w0' does not fit its checksum"):
        read_tensor(source, "w0")
