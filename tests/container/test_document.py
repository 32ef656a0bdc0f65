"""docs/container.md says everything: its vectors hold, and a decoder written from it reads all files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import second_decoder
from test_golden import DIGESTS, GOLDEN

from penjing.container import arithmetic, format, huffman, lengths, mixing, wire
from penjing.container.planes import VIEWS, Content, element_type
from penjing.container.streams import Reader, number

DOCUMENT = Path(__file__).parents[2] / "docs" / "container.md"
VECTORS = json.loads(DOCUMENT.with_name("container-vectors.json").read_text())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_second_decoder_reads_the_golden_files(path):
    model = second_decoder.unpack(path.read_bytes())
    assert hashlib.sha256(model).hexdigest() == DIGESTS[path.stem]


def symbols(vector: dict) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(vector["symbols"]), np.uint8)


@pytest.mark.parametrize("vector", VECTORS["numbers"], ids=lambda vector: vector["coded"])
def test_numbers(vector):
    coded = bytes.fromhex(vector["coded"])
    assert number(vector["value"]) == coded
    assert Reader(coded).number() == second_decoder.Fields(coded).number() == vector["value"]


def test_the_range_coder():
    """Against constriction itself, too: its probabilities and its code are part of the format."""
    vector = VECTORS["range coder"]
    coded = bytes.fromhex(vector["coded"])
    words = np.frombuffer(coded + bytes(-len(coded) % 4), ">u4").astype(np.uint32)
    first, second = arithmetic.RangeDecoder(words), second_decoder.RangeDecoder(coded)
    for step in vector["steps"]:
        model = arithmetic.Categorical(np.array(step["counts"], np.float64), perfect=False)
        assert first.decode(model, len(step["symbols"])).tolist() == step["symbols"]
        table = second.table(np.array(step["counts"]))
        assert table == step["cumulative"]
        assert [second.decode(table) for _ in step["symbols"]] == step["symbols"]


@pytest.mark.parametrize("vector", VECTORS["huffman"], ids=lambda vector: vector["coded"])
def test_huffman(vector):
    plain, coded = symbols(vector), bytes.fromhex(vector["coded"])
    assert huffman.encode(plain, vector["centre"]) == coded
    for decode in (huffman.decode, second_decoder.huffman):
        assert np.array_equal(decode(coded, len(plain)), plain)


@pytest.mark.parametrize(
    "vectors",
    [*([vector] for vector in VECTORS["arithmetic"]), VECTORS["inherited"]],
    ids=lambda vectors: vectors[0].get("what", "inherited"),
)
def test_arithmetic(vectors):
    memories: list[dict] = [{}, {}, {}]
    for vector in vectors:
        plain, coded, shape = (
            symbols(vector),
            bytes.fromhex(vector["coded"]),
            tuple(vector["shape"]),
        )
        code, left = arithmetic.encode(plain, shape, coded[2], "integers", memories[0])
        memories[0] |= left
        assert code == coded
        decoded, left = arithmetic.decode(coded, shape, "integers", memories[1])
        memories[1] |= left
        assert np.array_equal(decoded, plain)
        again = second_decoder.arithmetic(coded, shape, "integers", memories[2])
        assert np.array_equal(again, plain)


def test_graphs():
    skeleton, short, mixed = (
        bytes.fromhex(VECTORS["graph"][x]) for x in ("skeleton", "short", "mixed")
    )
    size = len(bytes.fromhex(VECTORS["file"]["onnx"]))
    assert lengths.shorten(skeleton, size) == short
    assert lengths.lengthen(short) == (skeleton, size)
    assert second_decoder.lengthen(second_decoder.Fields(short + b"\0")) == skeleton
    assert mixing.compress(short) == mixed
    assert mixing.decompress(mixed, len(short)) == second_decoder.unmix(mixed, len(short)) == short


@pytest.mark.parametrize("vector", VECTORS["views"], ids=lambda v: f"{v['view']}-{v['data_type']}")
def test_views(vector):
    view, data = VIEWS[vector["view"]], np.frombuffer(bytes.fromhex(vector["data"]), np.uint8)
    kind = element_type(vector["data_type"])
    content = Content(kind, tuple(vector["dims"]), tuple(vector["parts"]))
    planes = view.split(data, content)
    assert planes is not None
    assert [plane.symbols.tobytes().hex() for plane in planes] == vector["planes"]
    stored = iter(planes)
    assert view.join(content, lambda _: next(stored).symbols).tobytes() == data.tobytes()


def test_the_file():
    model, packed = (bytes.fromhex(VECTORS["file"][x]) for x in ("onnx", "coded"))
    assert format.encode(model, "arithmetic") == packed
    assert format.decode(packed).model() == second_decoder.unpack(packed) == model
    assert wire.cut(model, wire.find(model)).hex() == VECTORS["graph"]["skeleton"]


def test_every_view_and_form_has_a_vector():
    assert {vector["view"] for vector in VECTORS["views"]} == set(range(len(VIEWS)))
    found = {vector["form"] for vector in VECTORS["arithmetic"]}
    assert found >= {arithmetic.UNEVEN + arithmetic.EIGHTS, *range(arithmetic.SPARSE + 1)}
