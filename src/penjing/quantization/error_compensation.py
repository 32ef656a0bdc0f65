"""Rounding in which later weights make good the error of earlier ones.

Source: Frantar et al. 2023, "GPTQ", algorithm 1, after Frantar & Alistarh 2022, "Optimal brain
compression"; columns in the order of falling input energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the diagonal, added to it."""
BLOCK = 128
"""Columns whose errors are carried to the rest of the matrix together."""


@dataclass(frozen=True)
class Elimination:
    """The order in which columns are rounded, and what each one's error does to the later ones.

    ``order`` int64 ``[G, K]``; ``inverse`` float32 ``[G, K, K]``, the upper Cholesky factor of the
    inverse of the moments in that order, divided by their ``level`` ``[G, 1]``.
    """

    order: Tensor
    inverse: Tensor
    level: Tensor

    @property
    def remaining(self) -> Tensor:
        """What is left of every column's second moment once the columns after it follow it best, in
        that order: ``[G, K]``."""
        return self.level * self.inverse.diagonal(dim1=1, dim2=2) ** -2


def eliminate(moments: Tensor, order: Tensor | None = None) -> Elimination:
    """How to round columns whose second moments are ``moments`` ``[G, K, K]``, positive definite, in
    ``order`` ``[K]`` or that of falling input energy. The work is cubic in K: keep it where one layer
    is rounded more than once."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True)
    falling = diagonal.argsort(1, descending=True)
    order = falling if order is None else order.to(moments.device).expand_as(falling)
    even = _permuted(moments, order) / level[..., None]  # the inverse of tiny ones would overflow
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(even))
    return Elimination(order, torch.linalg.cholesky(inverse, upper=True), level)


def compensated(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    rounding: Callable,
    elimination: Elimination | None = None,
) -> Tensor:
    """Round ``weight`` so that the layer's output changes little.

    Args:
        weight: float32 ``[G, R, K]``: G independent matrices. Exact zeros stay zero.
        moments: second moments of the inputs, float32 ``[G, K, K]``.
        scale: of every row, float32 ``[G, R]``.
        rounding: steps (weights divided by their scale) to integers.
        elimination: of the moments, damped, if it is known already; else they are damped here.

    Returns:
        ``integer * scale``, float32 ``[G, R, K]``. A row that compensation would make worse (by
        the moments) is rounded plainly.
    """
    plain = _rounded(weight, scale, weight != 0, rounding)
    known = elimination or eliminate(_damped(moments))
    columns = known.order[:, None, :].expand_as(weight)
    rounded = _sweep(weight.gather(2, columns), known.inverse, scale, rounding)
    found = torch.empty_like(weight).scatter_(2, columns, rounded)
    worse = output_error(found - weight, moments) > output_error(plain - weight, moments)
    return torch.where(worse[..., None], plain, found)


def output_error(difference: Tensor, moments: Tensor) -> Tensor:
    """Squared output error ``[G, R]`` of a change ``[G, R, K]`` of the weights."""
    return ((difference @ moments) * difference).sum(2)


def _permuted(moments: Tensor, order: Tensor) -> Tensor:
    size = moments.shape
    rows = moments.gather(1, order[:, :, None].expand(size))
    return rows.gather(2, order[:, None, :].expand(size))


def _damped(moments: Tensor) -> Tensor:
    diagonal = moments.diagonal(dim1=1, dim2=2)
    damping = (DAMPING * diagonal.mean(1)).clamp_min(1e-8)
    return moments + torch.diag_embed(damping[:, None].expand_as(diagonal))


def _sweep(weight: Tensor, inverse: Tensor, scale: Tensor, rounding: Callable) -> Tensor:
    rest, keep = weight.clone(), weight != 0
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[2], BLOCK):
        end = min(start + BLOCK, weight.shape[2])
        errors = torch.empty_like(rest[:, :, start:end])
        for i in range(start, end):
            column = rest[:, :, i]
            result[:, :, i] = _rounded(column[..., None], scale, keep[:, :, i : i + 1], rounding)[
                ..., 0
            ]
            error = (column - result[:, :, i]) / inverse[:, i, i, None]
            rest[:, :, i:end] -= error[..., None] * inverse[:, None, i, i:end]
            errors[:, :, i - start] = error
        rest[:, :, end:] -= errors @ inverse[:, start:end, end:]
    return result


def _rounded(weight: Tensor, scale: Tensor, keep: Tensor, rounding: Callable) -> Tensor:
    return torch.where(keep, rounding(weight / scale[..., None]) * scale[..., None], 0.0)
