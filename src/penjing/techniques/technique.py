"""What every technique is: validated settings and three moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from penjing.net.dead_channels import cut_idle
from penjing.net.plain import plain
from penjing.tasks import Task


class Technique(BaseModel, ABC):
    """One way to make a model cheaper: settings, and the moments at which it touches a model.

    After training: ``attach``, ``bake``. During training: ``attach``, train (the loop calls ``step``
    before the first and after every optimizer step), ``bake``. Techniques attached together are baked
    in reverse order. An instance holds the state of one run in private attributes: use a copy for
    each model (``fresh``).
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    name: ClassVar[str]
    """How recipes call it: the name of its module."""
    cannot_follow: ClassVar[dict[str, str]] = {}
    """Techniques that must not come before this one in a recipe, each with the reason why."""
    needs_training: ClassVar[str | None] = None
    """What to do instead, for a technique that is of no use after training."""
    leaves_idle_channels: ClassVar[bool] = False
    """Whether channels that have lost all their weights are to be cut once everything is baked."""

    def objection(self, earlier: Sequence[Technique]) -> str | None:
        """Why this technique cannot follow ``earlier`` ones in a recipe; None when it can."""
        for technique in earlier:
            if technique.name in self.cannot_follow:
                reason = self.cannot_follow[technique.name]
                return f"{self.name} comes after {technique.name}, but {reason}"
        return None

    def objection_beside(self, beside: Sequence[Technique]) -> str | None:
        """Why this technique cannot be in one stage with those listed before it; None when it can."""
        return None

    @abstractmethod
    def attach(self, model: nn.Module, task: Task) -> None:
        """Put the technique on ``model``, in place, at full strength."""

    def step(self, model: nn.Module, progress: float) -> None:
        """Set the strength for ``progress`` in [0, 1] of the training."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss of a training step, a scalar, once the model has run."""
        return 0.0

    @abstractmethod
    def bake(self, model: nn.Module) -> None:
        """Turn what ``attach`` put on into plain layers, in place."""

    def fresh(self) -> Technique:
        """The same settings without the state of a run."""
        return type(self)(**self.model_dump())


def apply(technique: Technique, model: nn.Module, task: Task) -> nn.Module:
    """A copy of ``model`` with ``technique`` attached and baked: its use after training."""
    model = plain(model, task.example.to(next(model.parameters()).device))
    run = technique.fresh()
    run.attach(model, task)
    bake([run], model, task)
    return model


def bake(attached: Sequence[Technique], model: nn.Module, task: Task) -> None:
    """Bake the techniques ``attached`` together, in place, and cut the channels that they left idle."""
    for technique in reversed(attached):
        technique.bake(model)
    if any(technique.leaves_idle_channels for technique in attached):
        cut_idle(model, task.example.to(next(model.parameters()).device))
