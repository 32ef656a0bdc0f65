"""What the loop knows of a technique."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel
from torch import Tensor, nn


class Attached(Protocol):
    """A technique on the model that is trained."""

    @property
    def settings(self) -> BaseModel:
        """The technique's settings: a checkpoint is of these alone."""

    def step(self, model: nn.Module, progress: float) -> None:
        """Follow the training: ``progress`` in [0, 1], before the first and after every step."""

    def penalty(self) -> Tensor | float:
        """Return what the loss of a step gets added, a scalar, once the model has run."""
