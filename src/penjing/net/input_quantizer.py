"""Quantize a layer's input: a quantizer whose scale can learn, and the hook that runs it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 1e-12
SMALLEST_INPUT_SCALE = 1e-8
"""Scale of an input that is always zero; integer kernels reject very unequal scales."""


class InputQuantizer(nn.Module):
    """Round a layer's input to ``scale * (integer - zero_point)`` with unsigned integers of ``bits``
    bits.

    ``scale`` and ``zero_point`` are scalars; 0.0 is always represented exactly. The scale learns
    until ``freeze``.

    Args:
        low, high: range of the input.
    """

    def __init__(self, low: float, high: float, bits: int) -> None:
        super().__init__()
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / (2**bits - 1), SMALLEST_INPUT_SCALE)
        self.bits = bits
        self.scale = nn.Parameter(torch.tensor(scale))
        self.zero_point: Tensor
        self.register_buffer("zero_point", torch.tensor(float(round(-low / scale))))

    def forward(self, x: Tensor) -> Tensor:
        low = -float(self.zero_point)
        high = 2**self.bits - 1 + low
        scale = self.scale.abs().clamp_min(SMALLEST_SCALE)
        if not torch.is_grad_enabled():
            return x.div(scale).clamp_(low, high).round_().mul_(scale)
        gain = (x[0].numel() * 2**self.bits) ** -0.5
        scale = ScaledGradient.apply(scale, gain)
        return Round.apply((x / scale).clamp(low, high)) * scale

    def freeze(self) -> None:
        """Stop learning: the scale becomes a buffer."""
        if "scale" in self._parameters:
            scale = self.scale.detach().abs().clamp_min(SMALLEST_SCALE)
            del self.scale
            self.register_buffer("scale", scale)


def put_on(layer: nn.Module, quantizer: InputQuantizer) -> None:
    """Attach ``quantizer`` to the input of ``layer``, given by position or by keyword."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def take_off(layer: nn.Module) -> None:
    """Remove the quantizer from the input of ``layer``, if there is one."""
    if hasattr(layer, "input_quantizer"):
        del layer.input_quantizer
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _quantize_input]:
        del hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = cast(nn.Module, layer.input_quantizer)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(kwargs["input"])}


class Round(torch.autograd.Function):
    """Round to the nearest integer; the gradient passes straight through (Bengio et al. 2013,
    arXiv:1308.3432)."""

    @staticmethod
    def forward(_ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class ScaledGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``gain``."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient * ctx.gain, None
