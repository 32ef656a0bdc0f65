"""Keeping 8-bit weights clear of the 16-bit saturation of x86 integer kernels.

Without VNNI instructions, ONNX Runtime's kernels add the products of two neighbouring 8-bit weights
and inputs in 16 bits (``vpmaddubsw``), which saturates when both weights are large and of one sign.
The results are then wrong without a sign of it. They cannot be when such a pair sums to at most
128: 255 * 128 < 2**15. Depthwise convolutions have a kernel without this step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from penjing.net import layers
from penjing.net.layers import Layer

LARGEST_PAIR = 128


def safe_scale(layer: Layer, weight: Tensor, scale: Tensor, slack: int = 1) -> Tensor:
    """``scale`` (float32 ``[out]``), enlarged for the channels in which a pair of 8-bit weights of
    ``layer`` could saturate.

    ``weight`` is shaped like the layer's. ``slack`` is how far rounding may move the sum of a pair:
    1 where each weight goes to the nearest integer. Weights on a safe grid keep it with slack 1.
    """
    if layers.is_depthwise(layer):
        return scale
    steps = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
    saturates = _largest_pair(steps.round()) > LARGEST_PAIR + 1 - slack
    wider = scale * _largest_pair(steps) / (LARGEST_PAIR - slack)
    return torch.where(saturates, wider, scale)


def _largest_pair(weight: Tensor) -> Tensor:
    """Neighbours are those in the order (kernel position, input channel), from even places on."""
    rows = weight.movedim(1, -1).flatten(1)
    return F.pad(rows, (0, rows.shape[1] % 2)).unflatten(1, (-1, 2)).sum(2).abs().amax(1)
