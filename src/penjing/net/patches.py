"""View a layer as one matrix product for each group: its weight as a matrix, its input as rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.container import contexts
from penjing.net.layers import Layer

MAX_COLUMNS = 4608
"""Largest number of columns; wider layers are split into independent pieces, because their moments
would not fit into memory."""
PATCHES_AN_IMAGE = 128


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Reshape the ``weight`` of ``layer`` to ``[groups, outputs of a group, K]``.

    The groups are those of a grouped convolution, or pieces of a very wide layer's columns, each of
    which has all outputs.
    """
    groups, pieces = _groups(layer), _pieces(layer)
    flat = weight.reshape(groups, weight.shape[0] // groups, -1)
    if pieces == 1:
        return flat
    return flat.reshape(weight.shape[0], pieces, -1).transpose(0, 1)


def from_matrix(layer: Layer, matrix: Tensor, shape: torch.Size) -> Tensor:
    """Reshape ``matrix`` ``[groups, outputs of a group, K]`` back to the weight's ``shape``."""
    if _pieces(layer) > 1:
        matrix = matrix.transpose(0, 1)
    return matrix.reshape(shape)


def coding_order(layer: Layer) -> Tensor | None:
    """Return the columns of ``matrix``, int64 ``[K]``, in the order in which the container codes a row
    of the weight; None where its rows are not rows of the weight."""
    rows, channels, *kernel = layer.weight.shape
    if rows == 1 or _pieces(layer) > 1:
        return None
    return torch.from_numpy(contexts.coding_order((rows, channels, math.prod(kernel))))


def rows(layer: Layer, x: Tensor, count: int) -> Tensor:
    """Sample about ``count`` of the input vectors that ``layer`` multiplies its weight by.

    Returns float ``[groups, rows, K]`` with the groups and K of ``matrix``; fewer rows if ``x`` (the
    input of ``layer``) has fewer. The choice is the same at every call.
    """
    vectors = (
        _linear_rows(x, count) if isinstance(layer, nn.Linear) else _conv_rows(layer, x, count)
    )
    pieces = _pieces(layer)
    groups = max(_groups(layer), pieces)
    return vectors.reshape(len(vectors), groups, vectors.shape[1] // groups).transpose(0, 1)


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _pieces(layer: Layer) -> int:
    """Return the least number of equal pieces of at most MAX_COLUMNS columns."""
    columns = layer.weight[0].numel()
    if _groups(layer) > 1 or columns <= MAX_COLUMNS:
        return 1
    return next(n for n in range(2, columns + 1) if columns % n == 0 and columns / n <= MAX_COLUMNS)


def _linear_rows(x: Tensor, count: int) -> Tensor:
    flat = x.detach().flatten(0, -2)
    return flat[_choice(len(flat), count, flat.device)]


def _conv_rows(layer: nn.Conv1d | nn.Conv2d, x: Tensor, count: int) -> Tensor:
    """Sample patches ``[rows, C * kernel]``: equally many of the first images, and if these have too
    few, all of the next ones."""
    images = min(len(x), -(-count // PATCHES_AN_IMAGE))
    used = _padded(layer, x[:images].detach())
    available = math.prod(_positions(layer, used))
    if not available:  # a layer that pads by itself, on a map smaller than its kernel
        return x.new_zeros(0, x.shape[1] * math.prod(layer.kernel_size))
    chosen = _choice(available, -(-count // images), x.device)
    found = _patches(layer, used, chosen)
    missing = count - len(found)
    if missing > 0 and images < len(x):
        more = _padded(layer, x[images : images + -(-missing // available)].detach())
        every = torch.arange(available, device=x.device)
        found = torch.cat([found, _patches(layer, more, every)[:missing]])
    return found


def _positions(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> list[int]:
    """Count the positions of the kernel on the padded ``x`` along each axis."""
    axes = zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    return [max((size - dil * (k - 1) - 1) // stride + 1, 0) for size, k, dil, stride in axes]


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor, chosen: Tensor) -> Tensor:
    """Copy the patches of the padded ``x`` ``[N, C, ...]`` at the positions ``chosen`` (int64, counted
    row by row): ``[N * len(chosen), C * kernel]``. All patches of a map would be many times its
    size."""
    places = torch.unravel_index(chosen, _positions(layer, x))
    offsets = [torch.arange(k, device=x.device) for k in layer.kernel_size]
    at: list[Any] = [slice(None), slice(None)]
    for axis, (place, offset) in enumerate(zip(places, offsets, strict=True)):
        along = place[:, None] * layer.stride[axis] + offset * layer.dilation[axis]
        shape = [len(chosen), *[1] * len(offsets)]
        shape[axis + 1] = len(offset)
        at.append(along.reshape(shape))
    found = x[tuple(at)]  # [N, C, positions, *kernel]
    return found.transpose(1, 2).flatten(0, 1).flatten(1)


def _padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    if layer.padding == "valid":
        return x
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(int(p), int(p)) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, [p for side in reversed(sides) for p in side], mode=mode)


def _choice(available: int, count: int, device: torch.device) -> Tensor:
    if available <= count:
        return torch.arange(available, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(available, generator=generator)[:count].to(device)
