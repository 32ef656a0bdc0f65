"""A layer as one matrix product for each group: its weight as a matrix, its input as rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.container import contexts
from penjing.layers import Layer

MAX_COLUMNS = 4608
"""Wider layers are cut into independent pieces: their moments would not fit into memory."""
PATCHES_AN_IMAGE = 128


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """``weight`` of ``layer`` as ``[groups, outputs of a group, K]``.

    The groups are those of a grouped convolution, or pieces of a very wide layer's columns, which
    then all have all outputs.
    """
    groups, pieces = _groups(layer), _pieces(layer)
    flat = weight.reshape(groups, weight.shape[0] // groups, -1)
    if pieces == 1:
        return flat
    return flat.reshape(weight.shape[0], pieces, -1).transpose(0, 1)


def from_matrix(layer: Layer, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``matrix``."""
    if _pieces(layer) > 1:
        matrix = matrix.transpose(0, 1)
    return matrix.reshape(shape)


def coding_order(layer: Layer) -> Tensor | None:
    """The columns of ``matrix``, int64 ``[K]``, in the order in which the container codes a row of the
    weight; None where its rows are not rows of the weight."""
    rows, channels, *kernel = layer.weight.shape
    if rows == 1 or _pieces(layer) > 1:
        return None
    return torch.from_numpy(contexts.coding_order((rows, channels, math.prod(kernel))))


def rows(layer: Layer, x: Tensor, count: int) -> Tensor:
    """About ``count`` of the input vectors that ``layer`` multiplies its weight by.

    Float ``[groups, rows, K]`` with the groups and K of ``matrix``; fewer rows if ``x`` (the input
    of ``layer``) has fewer. The choice is the same at every call.
    """
    vectors = (
        _linear_rows(x, count) if isinstance(layer, nn.Linear) else _conv_rows(layer, x, count)
    )
    pieces = _pieces(layer)
    groups = max(_groups(layer), pieces)
    return vectors.reshape(len(vectors), groups, -1).transpose(0, 1)


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _pieces(layer: Layer) -> int:
    """The fewest equal pieces of at most MAX_COLUMNS columns."""
    columns = layer.weight[0].numel()
    if _groups(layer) > 1 or columns <= MAX_COLUMNS:
        return 1
    return next(n for n in range(2, columns + 1) if columns % n == 0 and columns / n <= MAX_COLUMNS)


def _linear_rows(x: Tensor, count: int) -> Tensor:
    flat = x.detach().flatten(0, -2)
    return flat[_choice(len(flat), count, flat.device)]


def _conv_rows(layer: nn.Conv1d | nn.Conv2d, x: Tensor, count: int) -> Tensor:
    x = _padded(layer, x.detach())
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    images = min(len(x), -(-count // PATCHES_AN_IMAGE))
    found = []
    for image in range(images):
        columns = _columns(x[image : image + 1], kernel, dilation, stride)[0].T
        found.append(columns[_choice(len(columns), -(-count // images), x.device)])
    if sum(map(len, found)) < count:  # small maps: their few patches of more images
        more = _columns(x[images:], kernel, dilation, stride) if images < len(x) else None
        if more is not None:
            found.append(more.transpose(1, 2).flatten(0, 1)[: count - sum(map(len, found))])
    return torch.cat(found)


def _columns(
    x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """All patches ``[N, K, positions]``."""
    if set(kernel) == {1}:  # nothing to copy
        return x[:, :, :: stride[0], :: stride[1]].flatten(2)
    return F.unfold(x, kernel, dilation, 0, stride)


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
