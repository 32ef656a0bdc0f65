"""Estimate of what the container's adaptive coder spends on a layer's integers, with gradients.

As in ``container.contexts``, an integer is expected to be about as large as those in its row, input
channel, kernel position and kernel. Integers of one expected size, in half octaves, share a histogram.
The coder sees only what it has coded already; here all others are seen, which is a little too kind.

Source: Oktay et al. 2020, "Scalable model compression by entropy penalized reparameterization", for
training with the rate in the loss. Between two integers the rate is a straight line: its slope is
what the next integer costs more, so that the last weights of a row that is nearly empty are pulled to
zero hardest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.container.contexts import CLASSES, LOWEST

LARGEST = 127
"""Larger integers cost as much as this one."""
PRIOR = 24.0
"""Integers that a histogram has seen before the first one."""
LIMIT = 1e-6


def bits(steps: Tensor) -> tuple[Tensor, float]:
    """Estimate the bits of weights ``steps`` (divided by their step, float ``[rows, channels,
    positions]``).

    Returns:
        The sum over the weights as they are, a scalar with gradients; and that over their nearest
        integers.
    """
    sizes = steps.abs()
    integers = sizes.detach().round().clamp_max_(LARGEST)
    # In place on what has no gradient: layers of millions of weights come by at each step.
    tables = _classes(integers).mul_(LARGEST + 1)
    nearest = tables + integers.long()
    lengths = _code_lengths(nearest)
    below = sizes.detach().floor().clamp_max_(LARGEST - 1)
    at = tables.add_(below.long())
    low = lengths[at]
    slope = lengths[at.add_(1)].sub_(low)
    spent = (low + (sizes - below).clamp_max(1.0) * slope).sum()
    return spent, float(lengths[nearest].sum())


def _classes(integers: Tensor) -> Tensor:
    """Return half octaves of what each integer's neighbours lead to expect, int64 shaped like
    ``integers``."""
    rows, channels, positions = integers.shape
    mean = integers.mean().clamp_min(LIMIT)
    level = mean.log2() + 7 / 8 * _ratio(integers, (1, 2), channels * positions, mean, 4)
    if positions == 1:
        level = level + 6 / 8 * _ratio(integers, (0,), rows, mean, 4)
    else:
        level = level + 6 / 8 * _ratio(integers, (0, 2), rows * positions, mean, 4)
        level = level + 4 / 8 * _ratio(integers, (2,), positions, mean, 2)
    return ((2 * level).round_() - LOWEST).clamp_(0, CLASSES - 1).long()


def _ratio(
    integers: Tensor, dims: tuple[int, ...], number: int, mean: Tensor, weight: int
) -> Tensor:
    """Return the octaves by which the others along ``dims`` are larger than ``mean``, towards which
    they are drawn as by ``weight`` integers."""
    others = integers.sum(dims, keepdim=True) - integers
    return others.add_(weight * mean).div_((number - 1 + weight) * mean).log2_()


def _code_lengths(nearest: Tensor) -> Tensor:
    """Return the bits of each magnitude, with its sign, in each class: ``[CLASSES * (LARGEST +
    1)]``, one class after another, in each of which they never fall. ``nearest``: the place there
    of each integer."""
    seen = torch.bincount(nearest.flatten(), minlength=CLASSES * (LARGEST + 1))
    seen = seen.to(torch.float32).reshape(CLASSES, LARGEST + 1)
    octaves = (torch.arange(CLASSES, device=seen.device) + LOWEST) / 2
    expected = torch.exp2(octaves)[:, None]
    magnitudes = torch.arange(LARGEST + 1, device=seen.device)
    geometric = (expected / (1 + expected)) ** magnitudes / (1 + expected)
    likely = seen + PRIOR * geometric.clamp_min(LIMIT**2)
    lengths = likely.sum(1, keepdim=True).log2() - likely.log2() + (magnitudes > 0)
    return lengths.cummax(1).values.flatten()
