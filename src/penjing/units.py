"""Quantities with their units, read and written. KB and MB are 1000 and 1,000,000 bytes everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from penjing.errors import PenjingError

BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
FRACTION = {"%": 0.01}

MISSING = "–"


def parsed(value: object, of: dict[str, float], what: str) -> float:
    """Parse a quantity: ``"300KB"`` is 300000.0; a plain number has the unit whose factor in ``of`` is
    1. ``what`` names it in errors.

    Raises:
        PenjingError: it is not a positive number with one of the units.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zµ%]*)\s*", str(value).lower())
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if number <= 0 or (unit and unit not in of):
        expected = ", ".join(of)
        raise PenjingError(
            f"{what} must be a positive number with a unit of {expected}; found {value!r}"
        )
    return number * (of[unit] if unit else 1.0)


def number(value: float, decimals: int = 0) -> str:
    """Write ``1234.5`` as ``1,234.5``, with a true minus sign, so that columns align."""
    return f"{value:,.{decimals}f}".replace("-", "−")


def kilobytes(count: float) -> str:
    """Write bytes in thousands, without the unit."""
    return number(count / 1e3, 1)


def megabytes(count: float) -> str:
    """Write bytes in millions, without the unit."""
    return number(count / 1e6, 1)


def millions(count: float) -> str:
    """Write a number of multiply-accumulates in millions."""
    return number(count / 1e6, 2)


def milliseconds(value: float) -> str:
    """Write milliseconds to the microsecond, without the unit."""
    return number(value, 3)


def times(value: float) -> str:
    """Write a ratio, as in ``3.25×``."""
    return f"{number(value, 2 if value < 10 else 1)}×"


def size(count: float) -> str:
    """Write a number of bytes with its unit, for running text."""
    return f"{megabytes(count)} MB" if abs(count) >= 1e6 else f"{kilobytes(count)} KB"


def signed(text: str) -> str:
    """Put a plus sign before the ``text`` of a number above zero."""
    return text if text.startswith("−") or not text.strip("0.,×") else f"+{text}"


def duration(seconds: float) -> str:
    """Write seconds in the two largest units, as in ``24 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class ScoreUnit:
    """Unit that scores are written in: percent for those in [0, 1] (top-1, mAP), else none."""

    percent: bool

    @classmethod
    def of(cls, scores: Iterable[float | None]) -> ScoreUnit:
        return cls(all(0 <= score <= 1 for score in scores if score is not None))

    @property
    def name(self) -> str:
        return "%" if self.percent else ""

    @property
    def difference(self) -> str:
        return "points" if self.percent else ""

    def scaled(self, score: float) -> float:
        return 100 * score if self.percent else score

    def text(self, score: float) -> str:
        return number(self.scaled(score), 2 if self.percent else 4)

    def with_unit(self, score: float) -> str:
        return f"{self.text(score)} {self.name}".strip()

    def drop_with_unit(self, drop: float) -> str:
        return f"{self.text(drop)} {self.difference}".strip()
