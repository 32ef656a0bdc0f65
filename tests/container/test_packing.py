"""Whole files: back bit for bit, never larger than xz, and safe against damage."""

import json
import lzma
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx_files import chain, graph, quantized

from penjing.container import format, inspect, pack, unpack
from penjing.container.damage import DamageError
from penjing.errors import PenjingError

CODERS = ("arithmetic", "huffman")


def packed_size(file: bytes, folder: Path, coder="arithmetic") -> int:
    """Size of the container, after checking that it gives ``file`` back."""
    (folder / "model.onnx").write_bytes(file)
    size = pack(folder / "model.onnx", folder / "model.penjing", coder)
    assert size == (folder / "model.penjing").stat().st_size
    unpack(folder / "model.penjing", folder / "back.onnx")
    assert (folder / "back.onnx").read_bytes() == file
    return size


def round_trip(file: bytes, coder="arithmetic") -> format.Container:
    container = format.decode(format.encode(file, coder))
    assert container.model() == file
    assert container.matches(file)
    return container


def files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    dense = rng.normal(0, 0.05, (64, 32, 3, 3)).astype(np.float32)
    pruned = np.where(np.abs(dense) > 0.08, dense, 0).astype(np.float32)
    shared = np.float32([-0.3, -0.1, 0, 0.1, 0.4])[rng.integers(0, 5, (64, 300))]
    return {
        "empty": graph([]),
        "tiny": chain(np.float32([1.5])),
        "int8": quantized(rng, (16, 3, 3, 3), (32, 16, 3, 3), (10, 32)),
        "4 bit": quantized(rng, (16, 3, 3, 3), (64, 16, 3, 3), (10, 640), bits=4),
        "float32": chain(dense),
        "float16": chain(dense.astype(np.float16)),
        "pruned": chain(pruned),
        "shared": chain(shared),
        "random": chain(rng.integers(0, 256, 50_000).astype(np.uint8)),
        "twice the same": chain(*[rng.integers(0, 256, 30_000).astype(np.uint8)] * 2),
        "counting": chain(np.arange(20_000, dtype=np.int64)),
        "text": graph([], [helper.make_node("Identity", ["x"], ["y"], doc_string="long " * 500)]),
    }


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("name", files())
def test_no_file_is_larger_than_xz(name, coder, tmp_path):
    file = files()[name]
    assert packed_size(file, tmp_path, coder) <= len(lzma.compress(file, preset=9))


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["i1", "u1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8", "?"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12),
    ),
    st.sampled_from(CODERS),
)
def test_any_tensor_comes_back(array, coder):
    round_trip(chain(array), coder)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["float32", "float16", "int8", "uint8", "int16"]),
    st.sampled_from([(40, 50), (32, 16, 3, 3), (2000,), (1, 3000), (64, 1, 5, 5)]),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.floats(0.01, 40),
    st.sampled_from(CODERS),
    st.integers(0, 2**32 - 1),
)
def test_weights_come_back(dtype, shape, sparsity, scale, coder, seed):
    rng = np.random.default_rng(seed)
    values = rng.laplace(0, scale, shape) * (rng.random(shape) >= sparsity)
    if np.dtype(dtype).kind == "u":
        values = np.abs(values)
    array = values if np.dtype(dtype).kind == "f" else np.clip(values, -128, 127)
    round_trip(chain(array.astype(dtype)), coder)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("kind", ["INT4", "UINT8", "INT2"])
def test_sparse_integers_cost_near_their_entropy(kind, coder):
    """2 % ones and minus ones of places that are all alike: Shannon's bound, and a little more."""
    rng = np.random.default_rng(0)
    values = rng.choice([-1, 0, 1], (200, 400), p=[0.01, 0.98, 0.01])
    tensor = TensorProto(name="w", data_type=getattr(TensorProto, kind), dims=[200, 400])
    bits = {"INT4": 4, "UINT8": 8, "INT2": 2}[kind]
    symbols = (values + (7 if kind[0] == "U" else 0)).astype(np.int64) & (2**bits - 1)
    parts = symbols.reshape(-1, 8 // bits) << np.arange(0, 8, bits)
    tensor.raw_data = np.bitwise_or.reduce(parts, axis=1).astype(np.uint8).tobytes()
    container = round_trip(graph([tensor]), coder)
    entropy = -(0.98 * np.log2(0.98) + 0.02 * np.log2(0.01)) * values.size / 8
    limit = 1.06 if coder == "arithmetic" else 1.15
    assert container.streams[0].coded_bytes < limit * entropy + 60


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT2", "UINT2", "FLOAT8E4M3FN", "BFLOAT16"])
@pytest.mark.parametrize("count", [1, 7, 2000, 4001])
def test_packed_types_come_back(kind, count):
    rng = np.random.default_rng(0)
    data_type = getattr(TensorProto, kind)
    bits = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT8E4M3FN": 8, "BFLOAT16": 16}[kind]
    raw = rng.binomial(255, 0.5, -(-count * bits // 8)).astype(np.uint8).tobytes()
    tensor = TensorProto(name="w", data_type=data_type, dims=[count], raw_data=raw)
    container = round_trip(graph([tensor]))
    assert [span.name for span in container.spans] in ([], ["w"])


def test_four_bit_weights_cost_the_same_packed_in_nibbles_or_not(tmp_path):
    values = np.clip(np.rint(np.random.default_rng(0).laplace(0, 1.2, (128, 256))), -8, 7)
    nibbles = (values.astype(np.int64).ravel() & 15).astype(np.uint8)
    raw = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    tensor = TensorProto(name="w0", data_type=TensorProto.INT4, dims=[128, 256], raw_data=raw)
    narrow = packed_size(graph([tensor]), tmp_path)
    wide = packed_size(chain(values.astype(np.int8)), tmp_path)
    assert abs(narrow - wide) < 0.002 * wide + 16


def test_little_is_added_to_the_coded_weights(tmp_path):
    # LeNet-5's layers, with int8 weights, scales, zero points and biases.
    rng = np.random.default_rng(0)
    file = quantized(rng, (20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500))
    total = packed_size(file, tmp_path)
    container = format.decode((tmp_path / "model.penjing").read_bytes())
    coded = sum(stream.coded_bytes for stream in container.streams)
    assert total - coded - container.coded_skeleton <= 32
    assert len(container.streams) == 8  # five tensors of 1 KiB or more, and a stream a type


def test_inspect_accounts_for_every_byte(tmp_path):
    rng = np.random.default_rng(0)
    packed_size(quantized(rng, (32, 16, 3, 3), (10, 320)), tmp_path)
    contents = inspect(tmp_path / "model.penjing")
    by_name = {tensor.name: tensor for tensor in contents.tensors}
    weight = by_name["layer0.weight"]
    assert (weight.dtype, weight.shape, weight.coder) == ("int8", (32, 16, 3, 3), "arithmetic")
    assert weight.raw_bytes == 4608
    assert weight.bits_per_weight == pytest.approx(8 * weight.coded_bytes / 4608)
    assert contents.checksum_ok
    assert all(tensor.checksum_ok for tensor in contents.tensors)
    coded = sum(tensor.coded_bytes for tensor in contents.tensors)
    assert 0 < contents.total_bytes - contents.skeleton_bytes - coded <= 32
    assert contents.skeleton_coder == "mixed"
    assert json.loads(json.dumps(contents.to_dict()))["tensors"][0]["name"] == "layer0.weight"


def test_inspect_of_one_block(tmp_path):
    packed_size(files()["twice the same"], tmp_path)
    contents = inspect(tmp_path / "model.penjing")
    assert [(one.name, one.shape, one.coded_bytes) for one in contents.tensors] == [
        ("w0", (30_000,), None),
        ("w1", (30_000,), None),
    ]
    assert contents.skeleton_coder == "lzma"


def test_inspect_tells_the_damaged_tensor(tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.laplace(0, 4, (2, 60, 60)).astype(np.int8)
    packed_size(chain(first, second), tmp_path)
    path = tmp_path / "model.penjing"
    data = bytearray(path.read_bytes())
    data[-12] ^= 1  # in the last tensor's code, before its checksum
    path.write_bytes(data)
    contents = inspect(path)
    assert [tensor.checksum_ok for tensor in contents.tensors] == [True, False]
    assert not contents.checksum_ok


# Damage


def mutations(data: bytes, count: int, seed: int) -> list[bytes]:
    """``data`` with a few bits flipped, bytes changed, or its end cut off."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        out.append(bytes(changed[: rng.choice([None, None, rng.randrange(len(changed))])]))
    return out


@pytest.mark.parametrize("coder", CODERS)
def test_damage_is_one_clear_error(coder, tmp_path):
    rng = np.random.default_rng(0)
    pruned = np.where(rng.random((40, 20)) < 0.9, 0, rng.normal(0, 1, (40, 20)))
    shared = rng.integers(0, 9, (30, 40)) / 3
    weights = rng.laplace(0, 3, (16, 8, 3, 3)).astype(np.int8)
    file = chain(weights, pruned.astype(np.float32), shared.astype(np.float16))
    packed_size(file, tmp_path, coder)
    path = tmp_path / "model.penjing"
    for damaged in mutations(path.read_bytes(), 150, seed=1):
        path.write_bytes(damaged)
        try:
            unpack(path, tmp_path / "out.onnx")
        except PenjingError as error:
            assert "model.penjing cannot be unpacked" in str(error)
            assert not (tmp_path / "out.onnx").exists()
        else:  # a bit that pads the last byte of a code
            assert (tmp_path / "out.onnx").read_bytes() == file
            (tmp_path / "out.onnx").unlink()


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3), st.sampled_from([1, 2]))
def test_hostile_bodies_are_refused(body, layout, version):
    # A valid head that declares 5000 bytes, then anything: no outer check comes before the parsing.
    digest = bytes({1: 16, 2: 8}[version])
    data = format.MAGIC + bytes([version]) + b"\x88\x27" + digest + bytes([layout]) + body
    with pytest.raises(DamageError):
        container = format.decode(data)
        if not container.matches(container.model()):
            raise DamageError("checksum")


def test_sizes_are_capped_before_memory_is_used():
    huge = b"\xff" * 8 + b"\x7f"
    with pytest.raises(DamageError, match="more than the"):
        format.decode(format.MAGIC + b"\x01" + huge + bytes(17))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"PK\x03\x04" * 9, "does not start as a .penjing file"),
        (format.MAGIC + b"\x63" + bytes(40), "version 99"),
    ],
)
def test_foreign_files_are_named(data, message, tmp_path):
    (tmp_path / "x.penjing").write_bytes(data)
    for act in (lambda p: unpack(p, tmp_path / "out"), inspect):
        with pytest.raises(PenjingError, match=message):
            act(tmp_path / "x.penjing")


def test_pack_refuses_what_is_no_onnx_file(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x07 not protobuf")
    with pytest.raises(PenjingError, match=r"x\.onnx cannot be packed as an ONNX model"):
        pack(tmp_path / "x.onnx", tmp_path / "x.penjing")
    with pytest.raises(PenjingError, match="cannot be read"):
        pack(tmp_path / "missing.onnx", tmp_path / "x.penjing")
    assert not (tmp_path / "x.penjing").exists()


def test_pack_refuses_external_data(tmp_path):
    model = onnx.load_from_string(chain(np.ones((64, 64), np.float32)))
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(PenjingError, match="'w0' are in another file"):
        pack(tmp_path / "x.onnx", tmp_path / "x.penjing")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "x.onnx").write_bytes(files()["tiny"])
    with pytest.raises(PenjingError, match="cannot be written"):
        pack(tmp_path / "x.onnx", tmp_path / "x.onnx" / "x.penjing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PenjingError, match="cannot be written"):
        pack(tmp_path / "x.onnx", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.onnx"]


ISOLATED = """
import sys
for name in ("torch", "onnx", "onnx_ir", "google", "pydantic", "pickle5"):
    sys.modules[name] = None
started = set(sys.modules)
from penjing.container import unpack
unpack(sys.argv[1], sys.argv[2])
print(*sorted(name.partition(".")[0] for name in set(sys.modules) - started))
"""


def test_a_device_unpacks_with_numpy_and_constriction_only(tmp_path):
    packed_size(files()["int8"], tmp_path)
    command = [sys.executable, "-c", ISOLATED, tmp_path / "model.penjing", tmp_path / "out.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "out.onnx").read_bytes() == files()["int8"]
    modules = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert {name for name in modules if not name.startswith("_")} <= {
        *("numpy", "constriction", "penjing"),
    }


def test_packing_is_the_same_every_time():
    file = files()["int8"]
    assert format.encode(file, "arithmetic") == format.encode(file, "arithmetic")


@pytest.mark.parametrize("coder", CODERS)
def test_version_2_has_the_graph_in_its_checksums(coder):
    name = {"arithmetic": "version-1", "huffman": "version-1-huffman"}[coder]
    old = (Path(__file__).parent / "golden" / f"{name}.penjing").read_bytes()
    container = format.decode(old)
    (stream,) = container.streams
    assert int.from_bytes(old[-4:], "little") == zlib.crc32(stream.decoded.data)
    data = format.encode(container.model(), coder)
    again = format.decode(data)
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(
        container.skeleton + stream.decoded.data
    )
    assert again.version == 2 and again.streams[0].coded_bytes <= stream.coded_bytes


def test_a_file_is_not_packed_onto_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(graph([]))
    before = path.read_bytes()
    for act in (pack, unpack):
        with pytest.raises(PenjingError, match="give another file to write"):
            act(path, tmp_path / "." / "a.onnx")
    assert path.read_bytes() == before


def test_an_empty_file_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    with pytest.raises(PenjingError, match="is empty"):
        pack(tmp_path / "a.onnx", tmp_path / "a.penjing")
    assert not (tmp_path / "a.penjing").exists()
