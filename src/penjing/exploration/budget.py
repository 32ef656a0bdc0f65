"""What is enough: bytes, milliseconds, loss of score."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from penjing.errors import PenjingError, invalid

BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
FRACTION = {"%": 0.01}


def parse_quantity(value: Any, units: dict[str, float], what: str) -> float:
    """``"300KB"`` -> 300000.0; a plain number counts in the unit of 1 of ``units``.

    Raises:
        PenjingError: it is not a positive number with one of the units.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zµ%]*)\s*", str(value).lower())
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if number <= 0 or (unit and unit not in units):
        expected = ", ".join(units)
        raise PenjingError(
            f"{what} must be a positive number with a unit of {expected}; found {value!r}"
        )
    return number * (units[unit] if unit else 1.0)


def describe(excess: dict[str, tuple[float, float]]) -> str:
    """What ``Budget.excess`` found, with units: ``size 52.7 KB of at most 43.0 KB``."""
    written = {
        "size": lambda value: f"{value / 1e3:,.1f} KB",
        "latency": lambda value: f"{value:,.3f} ms",
        "drop": lambda value: f"{value:.2%}",
    }
    return ", ".join(
        f"{name} {written[name](found)} of at most {written[name](limit)}"
        for name, (found, limit) in excess.items()
    )


class Budget(BaseModel):
    """At most so many bytes, milliseconds and loss of score; what is None is not limited.

    Attributes:
        size: bytes of the packed file (``model.penjing``), or a string such as ``"300KB"``.
        latency: milliseconds for one image at one thread, or ``"2ms"``.
        drop: loss of score against the original as a fraction, or ``"1%"`` (one point).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: float | None = None
    latency: float | None = None
    drop: float | None = None

    def __init__(self, **limits: Any) -> None:
        try:
            super().__init__(**limits)
        except ValidationError as error:
            raise PenjingError(f"budget: {': '.join(invalid(error))}") from error

    @field_validator("size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return None if value is None else parse_quantity(value, BYTES, "size")

    @field_validator("latency", mode="before")
    @classmethod
    def _milliseconds(cls, value: Any) -> Any:
        return None if value is None else parse_quantity(value, MILLISECONDS, "latency")

    @field_validator("drop", mode="before")
    @classmethod
    def _fraction(cls, value: Any) -> Any:
        if value is None or value == 0:
            return value
        return parse_quantity(value, FRACTION, "drop")

    def excess(self, size: float, latency: float, drop: float) -> dict[str, tuple[float, float]]:
        """Which limits are exceeded: name -> (found, limit). Empty when the budget is met."""
        found = {"size": size, "latency": latency, "drop": drop}
        limits = self.model_dump()
        return {
            name: (value, limits[name])
            for name, value in found.items()
            if limits[name] is not None and value > limits[name] + 1e-12
        }
