"""Golden files: what the container wrote when each of its forms was new, byte for byte."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from penjing.container import arithmetic, format, unpack
from penjing.container.damage import DamageError
from penjing.container.planes import VIEWS, element_type
from penjing.container.streams import ARITHMETIC, CODERS, number

FOLDER = Path(__file__).parent / "golden"
GOLDEN = sorted(FOLDER.glob("*.penjing"))
DIGESTS = {
    name.removesuffix(".onnx"): digest
    for digest, name in (line.split() for line in (FOLDER / "SHA256").read_text().splitlines())
}


def test_every_golden_file_has_its_digest():
    assert {path.stem for path in GOLDEN} == DIGESTS.keys()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_unpack_to_the_bytes_they_were_made_of(path, tmp_path):
    unpack(path, tmp_path / "model.onnx")
    model = (tmp_path / "model.onnx").read_bytes()
    assert hashlib.sha256(model).hexdigest() == DIGESTS[path.stem]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_packing_gives_the_golden_files_again(path):
    """LZMA blocks are also liblzma's: another version of it may find shorter ones."""
    packed = path.read_bytes()
    if packed[4] == format.VERSION:
        model = format.decode(packed).model()
        coder = "huffman" if "huffman" in path.stem else "arithmetic"
        assert format.encode(model, coder) == packed


def forms(packed: bytes) -> set[tuple[str, object]]:
    """Every form that the file ``packed`` is an example of, as its fields name it."""
    container, streams = format._open(packed, format.LARGEST)
    head = 5 + len(number(container.size)) + len(container.digest)
    found: set[tuple[str, object]] = {("version", packed[4]), ("layout", packed[head])}
    for stream in streams:
        found |= {("view", VIEWS.index(stream.view)), ("type", stream.content.type.name)}
        found |= {("coder", plane.coder) for plane in stream.planes}
        modelled = [plane for plane in stream.planes if plane.coder == ARITHMETIC]
        found |= {("form", plane.payload[3]) for plane in modelled}
    return found


def accepted(read: Callable[[int], object], refusal: str) -> set[int]:
    """The bytes that ``read`` does not refuse with a sentence that holds ``refusal``."""
    found = set()
    for value in range(256):
        try:
            read(value)
        except DamageError as problem:
            if refusal in str(problem):
                continue
        found.add(value)
    return found


def possible() -> set[tuple[str, object]]:
    """Every form that the reader accepts."""
    magic, rest = format.MAGIC, bytes(20)
    forms = {
        "version": accepted(lambda it: format.decode(magic + bytes([it]) + rest), "version"),
        "layout": accepted(
            lambda it: format.decode(magic + b"\2\0" + bytes(8) + bytes([it]) + rest), "layout"
        ),
        "form": accepted(
            lambda it: arithmetic.decode(bytes([0, 1, 0, it]), (8, 32, 1), "integers", {}), "form"
        ),
        "view": range(len(VIEWS)),
        "coder": range(len(CODERS)),
        "type": {element_type(number).name for number in range(256)},
    }
    return {(field, value) for field, values in forms.items() for value in values}


def test_every_form_has_a_golden_file():
    found = set().union(*(forms(path.read_bytes()) for path in GOLDEN))
    assert found == possible()


def test_golden_files_inherit_histograms_in_every_form():
    """A second plane of a kind and form starts from what the first one left."""
    found = set()
    for path in GOLDEN:
        _, streams = format._open(path.read_bytes(), format.LARGEST)
        keys = [plane.memory_key for stream in streams for plane in stream.planes]
        found |= {key[1] for key in keys if key and keys.count(key) > 1}
    assert found == set(range(arithmetic.SPARSE + 1))
