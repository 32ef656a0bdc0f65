"""How a compressed model differs from the original, layer by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from penjing.report.study import Point

Layer = dict[str, Any]

NAMED_BITS = {"binary": 1, "ternary": 2}


@dataclass(frozen=True)
class Difference:
    """A layer of the original and what has become of it; several where it was factorized.

    Bytes are those of the weights at the width of their format, before entropy coding.
    """

    name: str
    before: list[Layer]
    after: list[Layer]

    @property
    def bytes_before(self) -> float:
        return sum(map(weight_bytes, self.before))

    @property
    def bytes_after(self) -> float:
        return sum(map(weight_bytes, self.after))


def compare(baseline: Point, point: Point) -> list[Difference]:
    """The original's layers in order, each with the layers of ``point`` that bear its name or lie
    below it (``conv1.0`` of a factorized ``conv1``); then layers that only ``point`` has."""
    left = [layer for layer in point.get("layers") or [] if layer["params"]]
    found = []
    for layer in baseline.get("layers") or []:
        if not layer["params"]:
            continue
        after = [one for one in left if _stems_from(one["name"], layer["name"])]
        left = [one for one in left if one not in after]
        found.append(Difference(layer["name"], [layer], after))
    return found + [Difference(layer["name"], [], [layer]) for layer in left]


def _stems_from(name: str, original: str) -> bool:
    return name == original or name.startswith(f"{original}.")


def weight_bytes(layer: Layer) -> float:
    """Bytes of a layer's parameters at the width of its format."""
    return layer["params"] * bits(layer["format"]) / 8


def bits(weight_format: str) -> int:
    """8 for ``int8``, 32 for ``float32``, 4 for ``4-bit codebook``, 5 for ``shared, 32 values``.

    Raises ValueError for a format that names no width.
    """
    if codebook := re.fullmatch(r"shared, (\d+) values", weight_format):
        return max(1, (int(codebook[1]) - 1).bit_length())
    number = re.search(r"\d+", weight_format)
    width = int(number[0]) if number else NAMED_BITS.get(weight_format.lower())
    if width is None:
        raise ValueError(f"weight format {weight_format!r} names no number of bits")
    return width
