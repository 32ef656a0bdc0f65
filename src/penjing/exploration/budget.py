"""The budget of a study: limits of size, latency and drop in score."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from penjing import units
from penjing.errors import PenjingError, invalid


def describe(excess: dict[str, tuple[float, float]]) -> str:
    """Write the result of ``Budget.excess`` with units: ``size 52.7 KB of at most 43.0 KB``."""
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
    """Limits of size, latency and drop in score; None is no limit.

    Attributes:
        size: largest packed file (``model.penjing``), bytes, or a string such as ``"300KB"``.
        latency: largest latency of one image at one thread, ms, or ``"2ms"``.
        drop: largest drop in score from the original as a fraction, or ``"1%"`` (one point).

    Raises:
        PenjingError: a limit is not a positive number with a unit.
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
        """Return the exceeded limits: name -> (found, limit); empty when the budget is met."""
        found = {"size": size, "latency": latency, "drop": drop}
        limits = self.model_dump()
        return {
            name: (value, limits[name])
            for name, value in found.items()
            if limits[name] is not None and value > limits[name] + 1e-12
        }
