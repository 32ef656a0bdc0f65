"""What is enough: bytes, milliseconds, loss of score."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from penjing import units
from penjing.errors import PenjingError, invalid


def describe(excess: dict[str, tuple[float, float]]) -> str:
    """What ``Budget.excess`` found, with units: ``size 52.7 KB of at most 43.0 KB``."""
    written = {
        "size": lambda value: f"{units.kilobytes(value)} KB",
        "latency": lambda value: f"{units.milliseconds(value)} ms",
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
        return None if value is None else units.parsed(value, units.BYTES, "size")

    @field_validator("latency", mode="before")
    @classmethod
    def _milliseconds(cls, value: Any) -> Any:
        return None if value is None else units.parsed(value, units.MILLISECONDS, "latency")

    @field_validator("drop", mode="before")
    @classmethod
    def _fraction(cls, value: Any) -> Any:
        if value is None or value == 0:
            return value
        return units.parsed(value, units.FRACTION, "drop")

    def excess(self, size: float, latency: float, drop: float) -> dict[str, tuple[float, float]]:
        """Which limits are exceeded: name -> (found, limit). Empty when the budget is met."""
        found = {"size": size, "latency": latency, "drop": drop}
        limits = self.model_dump()
        return {
            name: (value, limits[name])
            for name, value in found.items()
            if limits[name] is not None and value > limits[name] + 1e-12
        }
