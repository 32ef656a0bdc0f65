"""The interface between the training loop and a technique."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel
from torch import Tensor, nn


class Attached(Protocol):
    """A technique attached to the model that is trained."""

    @property
    def settings(self) -> BaseModel:
        """Settings of the technique; a checkpoint belongs to these alone."""

    def step(self, model: nn.Module, progress: float) -> None:
        """Set the strength for ``progress`` in [0, 1], before the first and after every step."""

    def penalty(self) -> Tensor | float:
        """Return a scalar that is added to the loss of a step, once the model has run."""
