"""Remove whole channels: the layers become narrower, so any runtime runs them faster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.errors import PenjingError
from penjing.net import channels, layers
from penjing.net.channels import Group, Slice
from penjing.net.observation import differentiable
from penjing.net.profiling import profile
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task, outputs
from penjing.tasks.outputs import evaluating
from penjing.techniques.by_layer import ByLayer
from penjing.techniques.technique import Attached, Kind, Technique, apply
from penjing.training.schedule import cubic

MOST_REMOVED = 0.9
"""Largest share of one group's channels that goes, so that no layer becomes a bottleneck."""
TAYLOR_BATCH = 64


class PruneChannels(Technique):
    """Settings of channel pruning.

    Attributes:
        ratio: share of the model's multiply-accumulates (as ``penjing.profile`` counts them) to
            remove, in (0, 1). Removed is the least number of channels that reaches it. Given by layer,
            it is the share of each layer's output channels instead; layers whose channels are added
            to one another need the same. A layer that no pattern fits keeps its channels.
        importance: of a channel, over all weights that make it or read it. ``magnitude`` is the sum
            of their squares, ``taylor`` the sum of ``|weight * gradient|`` on training images: the
            first-order change of the loss (Molchanov et al. 2019, arXiv:1906.10771).
        round_to: numbers of remaining channels are multiples of it (8 suits many integer kernels).
        images: training images for ``taylor``.
    """

    name: ClassVar[str] = "prune_channels"
    kind: ClassVar[Kind] = Kind.CHANNELS

    ratio: ByLayer[Annotated[float, Field(gt=0, lt=1)]]
    importance: Literal["magnitude", "taylor"] = "magnitude"
    round_to: int = Field(default=1, ge=1)
    images: int = Field(default=512, ge=1)

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Choose the channels and mask the weights that read them.

        Raises:
            PenjingError: the model has too few removable channels for ``ratio``
                (the message says what can be reached), layers whose channels go together have several,
                or an earlier technique of the same stage quantizes weights.
        """
        _check_nothing_learns_on_weights(model)
        example = task.example.to(next(model.parameters()).device)
        groups = channels.groups(model, example)
        if not groups:
            raise PenjingError("prune_channels found no removable channels; use factorize instead.")
        saliency = self._saliency(model, task)
        scores = [_scores(group, model, saliency) for group in groups]
        if isinstance(self.ratio, dict):
            plan = Plan(groups, _order(scores), self._counts(model, groups))
        else:
            plan = _choose(model, example, groups, scores, self.ratio, self.round_to)
        if not channels.is_exact(model, example, plan.removal(1.0)):
            raise PenjingError(
                "prune_channels finds no channels in this model that can be cut together without "
                "changing the rest; use factorize instead."
            )
        attached = PrunedChannels(self, plan, example)
        attached.step(model, 1.0)
        return attached

    def _counts(self, model: nn.Module, groups: list[Group]) -> list[int]:
        """Return the units that each group loses, by the ratio of the layers that make its channels."""
        makers = [_makers(model, group) for group in groups]
        ratios = self.each("ratio", dict.fromkeys(name for names in makers for name in names))
        counts = []
        for group, names in zip(groups, makers, strict=True):
            if len({ratios[name] for name in names}) > 1:
                given = ", ".join(f"{name} ({ratios[name]})" for name in names)
                raise PenjingError(
                    f"prune_channels: ratio differs for layers whose channels go together, {given}; "
                    "give them one ratio, or null to leave them alone."
                )
            wanted = math.ceil((ratios[names[0]] or 0.0) * group.units) if names else 0
            counts.append(_allowed(group, wanted, self.round_to))
        return counts

    def _saliency(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the importance of the single weights of each layer (same shape as the weight)."""
        if self.importance == "taylor":
            return _taylor(model, task, self.images)
        return {n: layer.weight.detach() ** 2 for n, layer in layers.compressible(model).items()}


@dataclass(eq=False)
class PrunedChannels(Attached):
    """Channels that are masked, and cut out in the end.

    Attributes:
        plan: which channels go.
        example: one input, float32 ``[1, C, H, W]``, on which the cut must not change the output.
    """

    plan: Plan
    example: Tensor

    def step(self, model: nn.Module, progress: float) -> None:
        """Mask the share of the chosen channels that the cubic schedule gives, worst first."""
        for name, columns in channels.reading(self.plan.removal(cubic(progress))).items():
            layer = channels.entry(model, name)
            _mask(layer).copy_(channels.column_mask(layer, columns))

    def bake(self, model: nn.Module) -> None:
        """Cut the channels out.

        Raises:
            PenjingError: the output on an example changes (a later technique stands in the way).
        """
        self.step(model, 1.0)
        expected = channels.outputs(model, self.example)
        for layer in list(model.modules()):
            layers.fold(layer, ColumnMask)
        channels.remove(model, self.plan.removal(1.0))
        if not outputs.same(expected, channels.outputs(model, self.example)):
            raise PenjingError(
                "Cutting the channels changes the model's output, because another technique of the "
                "same stage rescaled or moved them; put prune_channels into an earlier stage."
            )


def prune_channels(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    """Return a narrower copy of ``model``, post-training. For settings see ``PruneChannels``."""
    return apply(PruneChannels(**settings), model, task)


def _check_nothing_learns_on_weights(model: nn.Module) -> None:
    for name, layer in layers.compressible(model).items():
        if parametrize.is_parametrized(layer, "weight"):
            links = layer.parametrizations["weight"]  # type: ignore[index, union-attr]
            if any(list(link.parameters()) for link in links):
                raise PenjingError(
                    f"Layer {name} is being quantized by an earlier technique of this stage, which "
                    "cutting channels would undo; list prune_channels first."
                )


class ColumnMask(nn.Module):
    """Parametrization: weights times a mask that is 0 where they read a doomed channel (see
    ``channels.column_mask``)."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Plan:
    """Units to remove: so many of each group, in the order of their importance."""

    def __init__(self, groups: list[Group], order: list[Tensor], counts: list[int]) -> None:
        self.groups, self.order, self.counts = groups, order, counts

    def removal(self, share: float) -> channels.Removal:
        """Return the groups with the first ``share`` of their doomed units, bool ``[units]``."""
        removal = []
        for group, order, count in zip(self.groups, self.order, self.counts, strict=True):
            units = torch.zeros(group.units, dtype=torch.bool)
            units[order[: round(share * count)]] = True
            removal.append((group, units))
        return removal


def _mask(layer: Any) -> Tensor:
    """Return the mask on the layer's weight, put there if it has none (factorize brings new layers)."""
    if parametrize.is_parametrized(layer, "weight"):
        for link in layer.parametrizations["weight"]:
            if isinstance(link, ColumnMask):
                return link.mask
    link = ColumnMask(channels.column_mask(layer, torch.tensor([], dtype=torch.long)))
    parametrize.register_parametrization(layer, "weight", link, unsafe=True)
    return link.mask


def _taylor(model: nn.Module, task: Task, images: int) -> dict[str, Tensor]:
    found = layers.compressible(model)
    weights = {name: layers.original(layer) for name, layer in found.items()}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    device = next(iter(weights.values())).device
    with evaluating(model), differentiable(weights.values()):
        for batch, target in task.batches("train", TAYLOR_BATCH, limit=images):
            loss = task.loss(model(batch.to(device)), target.to(device))
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                if gradient is not None:
                    total[name] += (weight.detach() * gradient).abs()
    return total


def _scores(group: Group, model: nn.Module, saliency: dict[str, Tensor]) -> Tensor:
    """Return the importance of the group's units ``[units]``, 1 on average."""
    score = torch.zeros(group.units, dtype=torch.float64)
    for piece in group.slices:
        if piece.layer in saliency:
            layer = model.get_submodule(piece.layer)
            each = channels.by_channel(saliency[piece.layer], piece, getattr(layer, "groups", 1))
            score.index_add_(0, piece.units, each[piece.channels])
    return score / score.mean().clamp(min=1e-30)


def _choose(
    model: nn.Module,
    example: Tensor,
    groups: list[Group],
    scores: list[Tensor],
    ratio: float,
    round_to: int,
) -> Plan:
    """Find the fewest units, lowest scores of all groups first, that remove the share of MACs."""
    cost = _Cost(model, example, groups)
    ranked = torch.cat([score.sort().values for score in scores])
    owner = torch.cat([torch.full((g.units,), i) for i, g in enumerate(groups)])
    owner = owner[ranked.argsort(stable=True)]

    def counts(threshold: int) -> list[int]:
        below = owner[:threshold].bincount(minlength=len(groups)).tolist()
        pairs = zip(groups, below, strict=True)
        return [_allowed(group, count, round_to) for group, count in pairs]

    low, high = 0, len(owner)
    reached = cost.saved(counts(high))
    if reached < ratio:
        raise PenjingError(
            f"prune_channels cannot remove {ratio:.0%} of the multiply-accumulates of "
            f"this model, at most {reached:.0%}; lower ratio or round_to."
        )
    while high - low > 1:
        middle = (low + high) // 2
        enough = cost.saved(counts(middle)) >= ratio
        low, high = (low, middle) if enough else (middle, high)
    return Plan(groups, _order(scores), counts(high))


def _order(scores: list[Tensor]) -> list[Tensor]:
    return [score.argsort(stable=True) for score in scores]


def _makers(model: nn.Module, group: Group) -> list[str]:
    """Return the layers whose outputs the channels of ``group`` are; a depthwise one only passes
    them on."""
    found = {
        name: m for name, m in layers.compressible(model).items() if not layers.is_depthwise(m)
    }
    made = (piece.layer for piece in group.slices if piece.side == "out")
    return list(dict.fromkeys(name for name in made if name in found))


def _allowed(group: Group, count: int, round_to: int) -> int:
    """``count`` units to remove, lowered so that enough of them, and a round number, is left."""
    left = max(group.units - count, math.ceil((1 - MOST_REMOVED) * group.units))
    return group.units - group.rounded(left, round_to)


class _Cost:
    """MACs of the model as a function of how many units each group loses."""

    def __init__(self, model: nn.Module, example: Tensor, groups: list[Group]) -> None:
        self.macs = {layer.name: layer.macs for layer in profile(model, example).layers}
        self.total = sum(self.macs.values())
        # Layer and side -> (group, share of that side's channels in one unit).
        self.shares: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for index, group in enumerate(groups):
            for piece in group.slices:
                self._add(model, index, group, piece)

    def _add(self, model: nn.Module, index: int, group: Group, piece: Slice) -> None:
        layer = model.get_submodule(piece.layer)
        if piece.layer not in self.macs or not isinstance(layer, layers.Layer):
            return
        width = len(layer.weight)
        if piece.side == "in":
            width = layer.weight.shape[1] * getattr(layer, "groups", 1)
        share = len(piece.channels) / (group.units * width)
        sides = self.shares.setdefault(piece.layer, {"in": [], "out": []})
        sides[piece.side].append((index, share))

    def saved(self, counts: list[int]) -> float:
        """Return the share of the MACs that goes when group ``i`` loses ``counts[i]`` units."""
        left = 0.0
        for name, macs in self.macs.items():
            kept = 1.0
            for parts in self.shares.get(name, {}).values():
                kept *= 1 - sum(counts[index] * share for index, share in parts)
            left += kept * macs
        return 1 - left / self.total
