"""Rounding in which later weights make good the error of earlier ones.

Source: Frantar et al. 2023, "GPTQ", algorithm 1, after Frantar & Alistarh 2022, "Optimal brain
compression"; columns in the order of falling input energy. In the form of Chee et al. 2023, "QuIP",
section 3, which needs no inverse: each column is moved by what it makes good of the changes of those
before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the diagonal's mean that is added to it."""
BLOCK = 128
"""Columns whose errors are carried to the rest of the matrix together."""


@dataclass(frozen=True)
class Elimination:
    """The order in which columns are rounded, and how later ones make good the changes of earlier ones.

    ``order`` int64 ``[G, K]``; ``factor`` float32 ``[G, K, K]``, lower triangular: row j says by how
    much of the change of each earlier column column j moves; ``remaining`` float32 ``[G, K]`` is what
    is left of every column's second moment once the columns after it follow it best. All in that order.
    """

    order: Tensor
    factor: Tensor
    remaining: Tensor


def eliminate(moments: Tensor, order: Tensor | None = None) -> Elimination:
    """Find how to round columns whose second moments are ``moments`` ``[G, K, K]``, positive
    definite, in ``order`` ``[K]`` or that of falling input energy. The work is cubic in K: keep it
    where one layer is rounded more than once."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True)
    falling = diagonal.argsort(1, descending=True)
    order = falling if order is None else order.to(moments.device).expand_as(falling)
    even = _permuted(moments, order.flip(1)).div_(level[..., None])  # tiny ones have no root
    lower = torch.linalg.cholesky(even, upper=True).flip(1, 2)
    spread = lower.diagonal(dim1=1, dim2=2).clone()
    return Elimination(order, lower.div_(spread[..., None]), level * spread.square())


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
        the damped moments) is rounded plainly.
    """
    if elimination is None:
        moments = _damped(moments)
        elimination = eliminate(moments)
    columns = elimination.order[:, :, None].expand(-1, -1, weight.shape[1])
    # Columns become rows: each is read and written as a whole.
    swept, error = _sweep(weight.transpose(1, 2).gather(1, columns), elimination, scale, rounding)
    found = torch.empty_like(swept).scatter_(1, columns, swept).transpose(1, 2)
    plain = _rounded(weight, scale[..., None], weight != 0, rounding)
    worse = error > output_error(plain - weight, moments)
    return torch.where(worse[..., None], plain, found)


def output_error(difference: Tensor, moments: Tensor) -> Tensor:
    """Return the squared output error ``[G, R]`` of a change ``[G, R, K]`` of the weights."""
    return ((difference @ moments).mul_(difference)).sum(2)


def _permuted(moments: Tensor, order: Tensor) -> Tensor:
    size = moments.shape
    rows = moments.gather(1, order[:, :, None].expand(size))
    return rows.gather(2, order[:, None, :].expand(size))


def _damped(moments: Tensor) -> Tensor:
    diagonal = moments.diagonal(dim1=1, dim2=2)
    damping = (DAMPING * diagonal.mean(1)).clamp_min(1e-8)
    return moments + torch.diag_embed(damping[:, None].expand_as(diagonal))


def _sweep(
    weight: Tensor, known: Elimination, scale: Tensor, rounding: Callable
) -> tuple[Tensor, Tensor]:
    """Return the rounded columns of ``weight`` ``[G, K, R]``, in the order of ``known``, and the
    squared output error of all of them ``[G, R]``."""
    rest, keep = weight.clone(), weight != 0
    rounded, changes = torch.empty_like(weight), torch.empty_like(weight)
    error = torch.zeros_like(scale)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        for at in range(start, end):
            moved = known.factor[:, at : at + 1, start:at] @ changes[:, start:at]
            column = rest[:, at] + moved[:, 0]
            rounded[:, at] = _rounded(column, scale, keep[:, at], rounding)
            changes[:, at] = weight[:, at] - rounded[:, at]
            error += (column - rounded[:, at]).square() * known.remaining[:, at, None]
        rest[:, end:].baddbmm_(known.factor[:, end:, start:end], changes[:, start:end])
    return rounded, error


def _rounded(weight: Tensor, scale: Tensor, keep: Tensor, rounding: Callable) -> Tensor:
    return torch.where(keep, rounding(weight / scale) * scale, 0.0)
