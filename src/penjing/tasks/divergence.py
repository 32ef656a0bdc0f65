"""Divergence of one model's outputs from another's, image by image, without labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def columns(scores: Tensor) -> Tensor:
    """Return class scores ``[N, classes, ...]``: ``scores`` of that shape as they are, and one logit
    ``[N]`` or ``[N, 1, ...]`` as ``[N, 2, ...]``, the first class having the logit 0. The softmax of
    the second is then the sigmoid of the logit.
    """
    one = scores[:, None] if scores.dim() == 1 else scores
    return torch.cat([torch.zeros_like(one), one], dim=1) if one.shape[1] == 1 else one


def of_scores(output: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the Kullback-Leibler divergence of the softmax of ``output`` from that of ``expected``
    for each image, in nats ``[N]``; the mean over the positions of a map.

    Args:
        output: class scores ``[N, classes, ...]``, or one logit, as in ``columns``.
        expected: scores of the same shape.
        temperature: divides both before the softmax.
    """
    found = F.log_softmax(columns(output) / temperature, dim=1)
    likely = F.log_softmax(columns(expected) / temperature, dim=1)
    each = F.kl_div(found, likely, reduction="none", log_target=True).sum(dim=1)
    return each.reshape(len(each), -1).mean(dim=1)


def of_values(output: Tensor, expected: Tensor, spread: Tensor) -> Tensor:
    """Compute the mean squared difference of ``output`` and ``expected`` ``[N, ...]`` for each image,
    ``[N]``, in units of ``spread``: 1 for a model that always gives the mean of ``expected``."""
    return (output - expected).square().reshape(len(output), -1).mean(dim=1) / spread


def spread_of(expected: Tensor) -> Tensor:
    """Return the variance of the values of ``expected``, a scalar above 0; the mean square of values
    that hardly differ, so that one image has a spread, too."""
    size = expected.square().mean()
    variance = expected.var(correction=0)
    spread = torch.where(variance > 1e-6 * size, variance, size)
    return spread.clamp(min=torch.finfo(expected.dtype).tiny)
