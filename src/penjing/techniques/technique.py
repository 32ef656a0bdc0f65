"""Techniques in general: frozen settings, and what they make of one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from penjing.net.dead_channels import cut_dead
from penjing.net.plain import plain
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task
from penjing.techniques import by_layer


class Kind(Enum):
    """Change that a technique makes to a model, by which ``order`` knows what may follow."""

    CHANNELS = auto()
    """Channels are cut out."""
    FACTORS = auto()
    """Layers are replaced by thinner ones."""
    ZEROS = auto()
    """Single weights become zero."""
    BLOCKS = auto()
    """Weights become zero in a pattern along the channels."""
    CODEBOOK = auto()
    """Weights take few values, whichever."""
    GRID = auto()
    """Weights become integers times a scale, near to what they are."""
    SIGNS = auto()
    """Weights become -1 or 1 times a scale."""
    CODED = auto()
    """Weights become integers times a scale, chosen for what they cost in the file."""
    BIASES = auto()
    """Biases change, and no weights."""


class Technique(BaseModel, ABC):
    """One way to make a model cheaper: its settings, which may be used on any number of models.

    Post-training: ``attach``, then ``Attached.bake``. During training: ``attach``, train (the loop
    calls ``Attached.step`` before the first and after every optimizer step), ``Attached.bake``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """Name in recipes, which is that of its module."""
    kind: ClassVar[Kind]
    """Change that it makes."""
    needs_training: ClassVar[str | None] = None
    """Advice, for a technique that is of no use post-training, what to do instead."""
    leaves_dead_channels: ClassVar[bool] = False
    """Channels that have lost all their weights are to be cut once everything is baked."""

    @property
    def changes(self) -> Kind:
        """Kind of its change with these settings: ``kind``, unless they make it another."""
        return self.kind

    def each(self, setting: str, names: Iterable[str]) -> dict[str, Any]:
        """Return the value of ``setting``, a ``ByLayer``, for each of the layers ``names``.

        Raises ``PenjingError`` where it is given for a pattern that none of them fits.
        """
        field = type(self).model_fields[setting]
        default = None if field.is_required() else field.default
        called = f"{self.name}: {setting}"
        return by_layer.for_each(getattr(self, setting), names, default, called)

    @abstractmethod
    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Put the technique on ``model``, in place, at full strength; ``target`` says how large files
        get."""


@dataclass(eq=False)
class Attached:
    """A technique on one model, with all that it has to remember of it."""

    settings: Technique

    def step(self, model: nn.Module, progress: float) -> None:
        """Set the strength for ``progress`` in [0, 1] of the training."""

    def penalty(self) -> Tensor | float:
        """Return a scalar to add to the loss of a training step, once the model has run."""
        return 0.0

    def bake(self, model: nn.Module) -> None:
        """Turn what ``attach`` put on ``model`` into plain layers, in place."""


def apply(technique: Technique, model: nn.Module, task: Task) -> nn.Module:
    """Return a copy of ``model`` with ``technique`` attached and baked: its use post-training."""
    model = plain(model, task.example.to(next(model.parameters()).device))
    bake([technique.attach(model, task)], model, task)
    return model


def bake(attached: Sequence[Attached], model: nn.Module, task: Task) -> None:
    """Bake the techniques ``attached`` together, the last first, and cut the dead channels they left."""
    for one in reversed(attached):
        one.bake(model)
    if any(one.settings.leaves_dead_channels for one in attached):
        cut_dead(model, task.example.to(next(model.parameters()).device))
