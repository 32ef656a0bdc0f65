"""What the loop knows of a technique."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Attached(Protocol):
    """A technique on the model that is trained."""

    @property
    def name(self) -> str:
        """The name that recipes call it by."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return its settings as plain data; a checkpoint is of these alone."""

    def step(self, model: nn.Module, progress: float) -> None:
        """Follow the training: ``progress`` in [0, 1], before the first and after every step."""

    def penalty(self) -> Tensor | float:
        """Return what the loss of a step gets added, a scalar, once the model has run."""
