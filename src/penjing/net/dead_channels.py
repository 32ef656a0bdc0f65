"""Remove dead channels, which training and rounding leave without weights.

A channel that nothing reads, or that is zero for every image, can be removed without changing the
output: the file loses its bias and scale, and the device the time for it. Kernels take channels in
blocks, so some dead ones stay to fill the last: 62 channels take longer than 64.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from penjing.net import channels, layers
from penjing.net.channels import Group, Removal, Slice
from penjing.net.observation import hooked
from penjing.tasks import outputs

ROUND_TO = 8
"""Number of channels in a block of AVX2's and of many integer kernels."""


def cut_dead(
    model: nn.Module, example: Tensor, round_to: int = ROUND_TO
) -> dict[str, tuple[int, int]]:
    """Remove dead channels from ``model``, in place; each layer keeps a multiple of ``round_to``
    channels, at least 1, or all.

    ``example`` is one input, float32 ``[N, ...]``. Returns the number of outputs before and after of
    each convolution and linear layer that lost some.
    """
    cut: dict[str, tuple[int, int]] = {}
    # Channels that only fed removed ones may now be dead too.
    while removal := _dead(model, example, round_to):
        expected = channels.outputs(model, example)
        trial = copy.deepcopy(model)
        widths = channels.remove(trial, removal)
        if not outputs.same(expected, channels.outputs(trial, example)):
            break
        channels.remove(model, removal)
        cut |= {name: (cut.get(name, width)[0], width[1]) for name, width in widths.items()}
    return cut


def constant(model: nn.Module, groups: list[Group]) -> Removal:
    """Find the units of ``groups`` that no weight computes, so that every image gives them alike."""
    with torch.no_grad():
        return [(group, _without_weights(model, group, _makers(model, group))) for group in groups]


def zero_constant(model: nn.Module, groups: list[Group]) -> None:
    """Zero the biases of the ``constant`` channels of ``groups``, and the means of their norms."""
    for group, units in constant(model, groups):
        for piece in group.slices:
            if piece.side == "out":
                _zero(channels.leaving(model, piece.layer), group.removed(piece, units))


def _dead(model: nn.Module, example: Tensor, round_to: int) -> Removal:
    if not any(_has_empty(layer) for layer in layers.compressible(model).values()):
        return []  # finding the groups takes seconds
    groups = channels.groups(model, example)
    zero = _zero_inputs(model, groups, example)
    removal = []
    for group, made_by_none in constant(model, groups):
        readers = [piece for piece in group.slices if piece.side == "in"]
        read_by_none = _without_weights(model, group, readers)
        units = read_by_none | (made_by_none & _everywhere(group, readers, zero))
        units[0] &= not bool(units.all())
        left = int((~units).sum())
        empty_first = (2 * units + made_by_none.int()).argsort(descending=True)
        units[empty_first[: group.rounded(left, round_to) - left]] = False
        if units.any():
            removal.append((group, units))
    return removal


def _has_empty(layer: layers.Layer) -> bool:
    """Whether any output or input of ``layer`` has no weights but zeros."""
    used = (layer.weight.detach() != 0).reshape(*layer.weight.shape[:2], -1).any(2)
    return not bool(used.any(0).all() and used.any(1).all())


def _makers(model: nn.Module, group: Group) -> list[Slice]:
    def makes(piece: Slice) -> bool:
        layer = channels.leaving(model, piece.layer)
        return isinstance(layer, layers.Layer) and not layers.is_depthwise(layer)

    return [piece for piece in group.slices if piece.side == "out" and makes(piece)]


def _without_weights(model: nn.Module, group: Group, pieces: list[Slice]) -> Tensor:
    """Mark the units whose weights in all ``pieces`` are zero, bool ``[units]``; none without
    pieces."""
    units = torch.full((group.units,), bool(pieces))
    for piece in pieces:
        end = channels.leaving if piece.side == "out" else channels.entry
        layer = cast(layers.Layer, end(model, piece.layer))
        sums = channels.by_channel(layer.weight.detach().abs(), piece, getattr(layer, "groups", 1))
        units[piece.units[sums[piece.channels] > 0]] = False
    return units


def _everywhere(group: Group, readers: list[Slice], zero: dict[str, Tensor]) -> Tensor:
    """Mark the units that are ``zero`` wherever they are read, bool ``[units]``."""
    units = torch.ones(group.units, dtype=torch.bool)
    for piece in readers:
        if piece.layer not in zero:
            return torch.zeros_like(units)  # it did not run
        units[piece.units[~zero[piece.layer][piece.channels]]] = False
    return units


def _zero_inputs(model: nn.Module, groups: list[Group], example: Tensor) -> dict[str, Tensor]:
    """Mark the inputs that are zero on ``example``, bool, of each layer that reads ``groups``."""
    readers = {p.layer for group in groups for p in group.slices if p.side == "in"}
    zero: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        used = inputs[0].detach().movedim(axis, 0).flatten(1).any(1).cpu()
        zero[name] = zero.get(name, torch.ones_like(used)) & ~used

    with hooked({name: channels.entry(model, name) for name in readers}, keep):
        channels.outputs(model, example)
    return zero


def _zero(layer: nn.Module, gone: Tensor) -> None:
    with torch.no_grad():
        if getattr(layer, "bias", None) is not None:
            layers.original(layer, "bias")[gone] = 0
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.running_mean[gone] = 0
