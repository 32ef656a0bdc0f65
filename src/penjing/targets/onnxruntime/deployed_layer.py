"""What the lowering passes must know about a layer, taken off the PyTorch model before export."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from penjing.net import layers
from penjing.net.layers import IntegerWeights, WeightFormat


@dataclass(frozen=True)
class Grid:
    """An unsigned affine grid: ``value = scale * (integer - zero_point)``, integers of ``bits`` bits."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def low(self) -> float:
        """The smallest value on the grid."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest value on the grid."""
        return (2**self.bits - 1 - self.zero_point) * self.scale


@dataclass(frozen=True)
class DeployedLayer:
    """A layer's weights (float32, on the grid of ``format``) and the grid of its input, if any.

    A node of the graph may read the weight ``transposed``.
    """

    name: str
    weight: np.ndarray
    format: WeightFormat | None
    input: Grid | None
    transposed: bool = False

    @property
    def stored(self) -> np.ndarray:
        """The weight as the graph reads it."""
        return self.weight.T if self.transposed else self.weight

    @property
    def integer(self) -> bool:
        """Whether an 8-bit integer kernel can run it: 8-bit input, weights of at most 8 bits."""
        return (
            self.input is not None
            and self.input.bits == 8
            and isinstance(self.format, IntegerWeights)
            and self.format.bits <= 8
        )


def take_layers(model: nn.Module) -> list[DeployedLayer]:
    """Describe every compressible layer of ``model`` and switch its input quantizer off, in place."""
    taken = []
    for name, module in layers.compressible(model).items():
        weight = module.weight.detach().numpy().copy()
        kind = getattr(module, "weight_format", None)
        taken.append(DeployedLayer(name, weight, kind, _input_grid(module)))
        if hasattr(module, "input_quantizer"):
            # The forward pre-hook goes on calling it; Identity leaves no trace in the exported graph.
            module.input_quantizer = nn.Identity()
    return taken


def _input_grid(module: nn.Module) -> Grid | None:
    quantizer = getattr(module, "input_quantizer", None)
    if quantizer is None:
        return None
    return Grid(float(quantizer.scale), int(quantizer.zero_point), int(quantizer.bits))
