"""Integer grids for weights and activations, with gradients; grids of a power of two for the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from penjing.net.input_quantizer import SMALLEST_SCALE, Round, ScaledGradient

IN_CACHE = 1 << 16
"""Weights that are tried together: each is read a hundred times."""


def limits(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of a weight grid: symmetric for 2 bits and 1 bit."""
    if bits <= 2:
        return -1, 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def to_codes(steps: Tensor, bits: int) -> Tensor:
    """Round ``steps`` (weights divided by their scale) to the integers of a ``bits``-bit grid.

    The gradient passes straight through inside the limits (Bengio et al. 2013). With 1 bit the
    integer is the sign, and 0 counts as positive.
    """
    low, high = limits(bits)
    inside = steps.clamp(low, high)
    return _Sign.apply(inside) if bits == 1 else Round.apply(inside)


def choose_scale(weight: Tensor, bits: int) -> Tensor:
    """Choose the scale of every row of ``weight`` (float ``[rows, columns]``), float ``[rows]``.

    16 and 8 bits: the largest weight lies on the last integer. 4 and 2 bits: the least squared
    error of 100 tries. 1 bit: the mean magnitude, which is the optimum (Rastegari et al. 2016,
    XNOR-Net, eq. 6). A row of zeros gets 1.
    """
    if bits == 1:
        scale = weight.abs().mean(1)
    else:
        scale = weight.abs().amax(1) / limits(bits)[1]
        if bits < 8:
            rows = max(1, IN_CACHE // weight.shape[1])
            pairs = zip(weight.split(rows), scale.split(rows), strict=True)
            scale = torch.cat([_search(part, widest, bits) for part, widest in pairs])
    return torch.where(scale > SMALLEST_SCALE, scale, 1.0)


def _search(weight: Tensor, widest: Tensor, bits: int) -> Tensor:
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for factor in torch.linspace(0.1, 1.09, 100).tolist():
        scale = (widest * factor).clamp_min(SMALLEST_SCALE)
        codes = weight.div(scale[:, None]).clamp_(*limits(bits)).round_()
        error = codes.mul_(scale[:, None]).sub_(weight).square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def step_for(values: Tensor, bits: int) -> float:
    """Return the smallest power of two of which ``2**(bits - 1) - 1`` reach the largest of
    ``|values|``."""
    largest = float(values.abs().max())
    return 2.0 ** math.ceil(math.log2(largest / (2 ** (bits - 1) - 1))) if largest > 0 else 1.0


def multiples(values: Tensor, step: float | Tensor) -> Tensor:
    """Return the nearest multiples of ``step``, a power of two: the container stores them as integers.

    None is -0.0, which is no integer.
    """
    return torch.round(values / step) * step + 0.0


class WeightQuantizer(nn.Module):
    """Parametrization that puts a weight on ``integer * scale[output channel]``.

    ``scale`` is float32 ``[out]``, or ``[1]`` when all channels are to keep the same.
    The scale learns too, with the gradient of Esser et al. 2020, "Learned step size quantization",
    eq. 3 and section 2.2.
    """

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        gain = (weight[0].numel() * limits(self.bits)[1]) ** -0.5
        scale = ScaledGradient.apply(self.positive_scale(), gain)
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        return to_codes(weight / scale, self.bits) * scale

    def positive_scale(self) -> Tensor:
        """Return the scale as used, shaped like ``scale``: a learned one must not reach zero."""
        return self.scale.abs().clamp_min(SMALLEST_SCALE)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x: Tensor) -> Tensor:
        return torch.where(x < 0, -1.0, 1.0)

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient
