"""Set single weights to zero: smaller files, and less work in runtimes with sparse kernels."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.errors import PenjingError
from penjing.net import layers
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task
from penjing.techniques.by_layer import ByLayer
from penjing.techniques.technique import Attached, Kind, Technique, apply
from penjing.training.schedule import cubic


def _parse(pattern: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f'pattern {pattern!r} is not "N:M" with 0 < N < M, such as "2:4"')
    return int(match[1]), int(match[2])


def _parsed(pattern: str) -> str:
    _parse(pattern)
    return pattern


Share = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, AfterValidator(_parsed)]
UPDATES = 100
"""Masks are chosen anew so many times in a training: ranking all weights takes time."""


class PruneWeights(Technique):
    """Settings of weight pruning; give ``sparsity`` or ``pattern``.

    Attributes:
        sparsity: share of the weights of all convolutions and linear layers to set to zero. Given by
            layer, such as ``{"conv1": 0.3, "fc*": 0.9}``, a layer that no pattern fits stays dense.
        pattern: ``"N:M"``: in every M weights that follow one another along the input channels, at
            most N stay, the largest (Mishra et al. 2021, arXiv:2104.08378). A layer whose input
            channels are not a multiple of M stays dense.
        scope: ``global`` ranks the weights of all layers together, ``layer`` those of each alone,
            as shares by layer always do.
        importance: ``lamp`` divides each squared weight by the sum of those of its layer that are
            no smaller, which makes layers comparable (Lee et al. 2021, arXiv:2010.07611).
            ``magnitude`` compares plain absolute values. Within a layer both rank alike.
    """

    name: ClassVar[str] = "prune_weights"
    kind: ClassVar[Kind] = Kind.ZEROS

    sparsity: ByLayer[Share] | None = None
    pattern: ByLayer[Pattern] | None = None
    scope: Literal["global", "layer"] = "global"
    importance: Literal["lamp", "magnitude"] = "lamp"

    @model_validator(mode="after")
    def _one_goal(self) -> PruneWeights:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError('give either sparsity (such as 0.8) or pattern (such as "2:4")')
        return self

    @property
    def changes(self) -> Kind:
        return Kind.ZEROS if self.pattern is None else Kind.BLOCKS

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Mask the least important weights.

        Raises:
            PenjingError: there is nothing to prune, no layer fits the pattern, or a name in
                ``sparsity`` fits no layer.
        """
        found = layers.compressible(model)
        goals = self.each("sparsity" if self.pattern is None else "pattern", found)
        found = {name: layer for name, layer in found.items() if _fits(layer, goals[name])}
        if not found:
            wanted = f" whose inputs fit the pattern {self.pattern}" if self.pattern else ""
            raise PenjingError(
                f"prune_weights found no convolution or linear layer to prune{wanted}; leave it out."
            )
        links: dict[nn.Module, WeightMask] = {}
        for name, layer in found.items():
            links[layer] = mask = WeightMask(layer.weight.detach(), goals[name])
            parametrize.register_parametrization(layer, "weight", mask, unsafe=True)
        attached = PrunedWeights(self, set(found), links)
        attached.step(model, 1.0)
        return attached


@dataclass(eq=False)
class PrunedWeights(Attached):
    """Weights under masks, ``links``, of the layers ``names``."""

    settings: PruneWeights
    names: set[str]
    links: dict[nn.Module, WeightMask]

    def step(self, model: nn.Module, progress: float) -> None:
        """Choose the masks anew for the sparsity that the cubic schedule gives, among the weights that
        masks attached earlier leave."""
        there = set(layers.compressible(model).values())
        links = {layer: link for layer, link in self.links.items() if layer in there}
        level = int(progress * UPDATES)
        # The level is kept with the masks, so that a resumed training chooses at the same steps.
        if all(int(link.level) == level for link in links.values()):
            return
        with torch.no_grad():
            weights = [_reaching(layer, link) for layer, link in links.items()]
            masks = self._masks(list(links.values()), weights, cubic(level / UPDATES))
            for link, mask in zip(links.values(), masks, strict=True):
                link.mask.copy_(mask)
                link.level.fill_(level)

    def bake(self, model: nn.Module) -> None:
        """Make the zeros permanent, and mark the layers as sparse so that they stay."""
        for name, layer in layers.compressible(model).items():
            if name in self.names:
                layers.fold(layer, WeightMask)
                layer.sparse = True  # type: ignore[assignment]

    def _masks(
        self, links: list[WeightMask], weights: list[Tensor], strength: float
    ) -> list[Tensor]:
        settings, pairs = self.settings, list(zip(weights, links, strict=True))
        if settings.pattern is not None:
            return [_pattern_mask(w, link.goal, strength) for w, link in pairs]
        if isinstance(settings.sparsity, dict) or settings.scope == "layer":
            return [_smallest([w.abs()], link.goal * strength)[0] for w, link in pairs]
        assert settings.sparsity is not None
        scores = [lamp(w) if settings.importance == "lamp" else w.abs() for w in weights]
        return _smallest(scores, settings.sparsity * strength)


def prune_weights(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    """Return a sparse copy of ``model``, post-training. For settings see ``PruneWeights``."""
    return apply(PruneWeights(**settings), model, task)


class WeightMask(nn.Module):
    """Parametrization: weights times a mask of zeros and ones.

    ``goal`` is the layer's sparsity at full strength, or its N:M pattern.
    """

    mask: Tensor
    level: Tensor

    def __init__(self, weight: Tensor, goal: Any) -> None:
        super().__init__()
        self.goal = goal
        self.register_buffer("mask", torch.ones_like(weight))
        self.register_buffer("level", torch.tensor(-1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def lamp(weight: Tensor) -> Tensor:
    """Return the layer-adaptive magnitude score of each weight, same shape, in (0, 1].

    ``w[u]**2 / sum(w[v]**2 for v with |w[v]| >= |w[u]|)``, with weights sorted to break ties
    (Lee et al. 2021, equation 4).
    """
    squares = weight.detach().double().flatten() ** 2
    ordered, order = squares.sort(stable=True)
    no_smaller = ordered.flip(0).cumsum(0).flip(0).clamp(min=1e-300)
    score = torch.empty_like(squares)
    score[order] = ordered / no_smaller
    return score.view_as(weight)


def _reaching(layer: nn.Module, link: WeightMask) -> Tensor:
    """Return the layer's weight with the masks that come before ``link``."""
    weight = layers.original(layer).detach()
    chain = layer.parametrizations["weight"]  # type: ignore[index, union-attr]
    for earlier in itertools.takewhile(lambda other: other is not link, chain):
        if isinstance(earlier, WeightMask):
            weight = earlier(weight)
    return weight


def _smallest(scores: list[Tensor], share: float) -> list[Tensor]:
    """Masks shaped like ``scores``: 0 at the smallest ``share`` of all of them, 1 elsewhere."""
    together = torch.cat([score.flatten() for score in scores])
    mask = torch.ones_like(together, dtype=torch.float32)
    count = round(share * together.numel())
    # A sort, not a threshold: equal scores must not make the share inexact.
    mask[together.argsort(stable=True)[:count]] = 0
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def _fits(layer: nn.Module, goal: float | str | None) -> bool:
    if isinstance(goal, str):
        return layers.original(layer).shape[1] % _parse(goal)[1] == 0
    return goal is not None


def _pattern_mask(weight: Tensor, pattern: str, strength: float) -> Tensor:
    """Return the N:M mask of ``weight``; at less than full strength only its smallest zeros."""
    kept, block = _parse(pattern)
    blocks = weight.abs().movedim(1, -1).unflatten(-1, (-1, block))
    ranks = blocks.argsort(dim=-1, stable=True).argsort(dim=-1)
    doomed = (ranks < block - kept).flatten(-2).movedim(-1, 1)
    spared = torch.where(doomed, weight.abs(), torch.inf)
    return _smallest([spared], strength * float(doomed.float().mean()))[0]
