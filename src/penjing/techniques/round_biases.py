"""Biases of few bits: in a file of a few kilobytes, they are a large part in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.errors import PenjingError
from penjing.net import layers
from penjing.net.norms import fold_batch_norm
from penjing.quantization import grids
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task
from penjing.techniques.by_layer import ByLayer
from penjing.techniques.technique import Attached, Kind, Technique, apply


class RoundBiases(Technique):
    """Round the biases of each layer to multiples of a power of two.

    The step is the smallest with which the layer's largest bias is an integer of ``bits`` bits. They
    stay float32: what is saved is saved by the entropy coder of the container. In training the
    gradient passes the rounding (Bengio et al. 2013, arXiv:1308.3432). Batch norms are folded first.
    """

    name: ClassVar[str] = "round_biases"
    kind: ClassVar[Kind] = Kind.BIASES

    bits: ByLayer[Annotated[int, Field(ge=2, le=16)]] = 4
    """Bits of the integers, with their sign."""

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Fold, round. Raises ``PenjingError`` where no layer has a bias."""
        device = next(model.parameters()).device
        fold_batch_norm(model, task.example.to(device))
        found = {n: m for n, m in layers.compressible(model).items() if m.bias is not None}
        if not found:
            raise PenjingError(
                "round_biases found no convolution or linear layer with a bias; leave it out."
            )
        chosen = {name: bits for name, bits in self.each("bits", found).items() if bits is not None}
        for name, bits in chosen.items():
            step = grids.step_for(layers.original(found[name], "bias").detach(), bits)
            rounding = BiasRounding(step)
            parametrize.register_parametrization(found[name], "bias", rounding, unsafe=True)
        return RoundedBiases(self, set(chosen))


@dataclass(eq=False)
class RoundedBiases(Attached):
    """Biases that are rounded, of the layers ``names``."""

    names: set[str]

    def bake(self, model: nn.Module) -> None:
        """Make the rounded biases permanent."""
        for name, layer in layers.compressible(model).items():
            if name in self.names:
                layers.fold(layer, BiasRounding, "bias")


def round_biases(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    """Return a copy of ``model`` with rounded biases, post-training. For settings see
    ``RoundBiases``."""
    return apply(RoundBiases(**settings), model, task)


class BiasRounding(nn.Module):
    """Parametrization: the nearest multiples of ``step``; the gradient passes."""

    step: Tensor

    def __init__(self, step: float) -> None:
        super().__init__()
        # A buffer, so that an interrupted training goes on where it was.
        self.register_buffer("step", torch.tensor(step))

    def forward(self, bias: Tensor) -> Tensor:
        rounded = grids.multiples(bias, self.step)
        return bias + (rounded - bias).detach() if torch.is_grad_enabled() else rounded
