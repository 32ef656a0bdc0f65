"""``inspect``: what a .penjing file holds and what each tensor costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from penjing.container import format, wire
from penjing.container.damage import DamageError
from penjing.container.format import Container, Stream
from penjing.container.packing import damaged, read
from penjing.container.planes import element_type
from penjing.container.wire import Span


@dataclass(frozen=True)
class PackedTensor:
    """One tensor: ``coded_bytes`` in the container of ``raw_bytes`` in the ONNX file.

    Small tensors share a stream; each is given its part of it by its size. In a container that is
    one LZMA block they cannot be told apart: ``coded_bytes`` and ``bits_per_weight`` are None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coder: str
    coded_bytes: int | None
    raw_bytes: int
    bits_per_weight: float | None
    checksum_ok: bool


@dataclass(frozen=True)
class Contents:
    """A container: its ``tensors`` in file order, and sizes in bytes.

    ``skeleton_bytes`` is the ONNX file without weights as it is coded by ``skeleton_coder``,
    ``total_bytes`` the container, ``onnx_bytes`` the file it unpacks to. ``checksum_ok`` is about all of
    that file.
    """

    tensors: list[PackedTensor]
    skeleton_coder: str
    skeleton_bytes: int
    total_bytes: int
    onnx_bytes: int
    checksum_ok: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as JSON has them."""
        return asdict(self)


def inspect(source: Path | str, *, most: int = format.LARGEST) -> Contents:
    """Read the .penjing file ``source`` and check it, without writing anything.

    ``most`` is the bytes that the ONNX file may have, as in ``unpack``.

    Raises:
        PenjingError: ``source`` cannot be read, or is damaged so that its tensors cannot be told
            apart. Damage inside tensors is reported by ``checksum_ok``.
    """
    data = read(source)
    try:
        container = format.decode(data, most)
        tensors = _of_streams(container) if container.streams else _of_block(container)
    except (DamageError, MemoryError) as problem:
        raise damaged(source, "inspected", problem) from problem
    correct = container.matches(container.model())
    coder, size = container.skeleton_coder, container.coded_skeleton
    return Contents(tensors, coder, size, len(data), container.size, correct)


def _of_streams(container: Container) -> list[PackedTensor]:
    tensors = {
        span.start: _tensor(span, stream.decoded.coder, share, stream.decoded.checksum_ok)
        for stream in container.streams
        for span, share in zip(stream.tensors, _shares(stream), strict=True)
    }
    return [tensors[span.start] for span in container.spans]


def _of_block(container: Container) -> list[PackedTensor]:
    correct = container.matches(container.model())
    return [_tensor(span, "lzma", None, correct) for span in wire.find(container.skeleton)]


def _shares(stream: Stream) -> list[int]:
    """The stream's bytes split over its tensors by their sizes, in whole bytes."""
    total = sum(span.size for span in stream.tensors)
    edges, at = [0], 0
    for span in stream.tensors:
        at += span.size
        edges.append(stream.coded_bytes * at // total)
    return [stop - start for start, stop in pairwise(edges)]


def _tensor(span: Span, coder: str, coded: int | None, correct: bool) -> PackedTensor:
    kind = element_type(span.data_type)
    weights = span.size * 8 / kind.bits
    bits = None if coded is None else 8 * coded / weights
    return PackedTensor(span.name, kind.name, span.dims, coder, coded, span.size, bits, correct)
