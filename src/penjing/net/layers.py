"""Layers: their weights, weight formats and parametrizations.

A compressed model stays a plain ``nn.Module``. Its layers have three attributes beside PyTorch's:
``weight_format`` (integers with scales, or a codebook), ``input_quantizer`` (a child module that
quantizes its input, called by a forward pre-hook) and ``sparse`` (zero weights stay zero in later
training).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.errors import PenjingError

Layer = nn.Conv1d | nn.Conv2d | nn.Linear


@dataclass
class IntegerWeights:
    """Weights that are ``integer * scale[output channel]``, with integers of ``bits`` bits.

    ``scale`` is float32 ``[out]``. Integers lie in ``-2**(bits-1) .. 2**(bits-1)-1`` for 16, 8 and 4
    bits, in ``{-1, 0, 1}`` for 2 bits and in ``{-1, 1}`` for 1 bit.
    """

    bits: int
    scale: Tensor


@dataclass
class CodebookWeights:
    """Weights that take only the values of ``values`` (float32 ``[k]``, ``k <= 2**bits``)."""

    bits: int
    values: Tensor


WeightFormat = IntegerWeights | CodebookWeights


def compressible(model: nn.Module) -> dict[str, Layer]:
    """Find the convolutional and fully connected layers of ``model`` by dotted name, in definition
    order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def check_finite(found: dict[str, Layer]) -> None:
    """Raise ``PenjingError`` where the weights of a layer ``found`` hold NaN or infinity."""
    for name, layer in found.items():
        if not torch.isfinite(layer.weight).all():
            raise PenjingError(
                f"the weights of layer {name} hold NaN or infinite values; load or train a model "
                "with finite weights."
            )


def is_depthwise(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution whose output channels each read one input channel."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return False
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def is_sparse(layer: Layer) -> bool:
    """Whether the zero weights of ``layer`` must stay zero: it is marked ``sparse``, or a
    parametrization makes zeros."""
    masked = parametrize.is_parametrized(layer, "weight") and bool((layer.weight == 0).any())
    return masked or getattr(layer, "sparse", False)


def original(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the trainable tensor behind ``module.name``: below all parametrizations, if any."""
    if parametrize.is_parametrized(module, name):
        return cast(Tensor, cast(Any, module).parametrizations[name].original)
    return getattr(module, name)


def set_original(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the trainable tensor behind ``module.name`` by ``value`` (any shape), keeping the
    parametrizations on it."""
    if parametrize.is_parametrized(module, name):
        cast(Any, module).parametrizations[name].original = nn.Parameter(value)
    else:
        setattr(module, name, nn.Parameter(value))


def fold(module: nn.Module, kind: type[nn.Module], name: str = "weight") -> bool:
    """Make permanent the first parametrization of type ``kind`` on ``module.name`` and all before it.

    Parametrizations registered after it stay. Returns whether there was one: False means that a
    technique attached later has already folded it.
    """
    if not parametrize.is_parametrized(module, name):
        return False
    attached = cast(nn.ModuleDict, module.parametrizations)
    chain = list(cast(nn.ModuleList, attached[name]))
    position = next((i for i, link in enumerate(chain) if isinstance(link, kind)), None)
    if position is None:
        return False
    with torch.no_grad():
        value = original(module, name)
        for link in chain[: position + 1]:
            value = link(value)
    others = {n: list(cast(nn.ModuleList, links)) for n, links in attached.items() if n != name}
    values = {n: original(module, n).detach() for n in others} | {name: value}
    unparametrize(module)
    for other, links in (others | {name: chain[position + 1 :]}).items():
        setattr(module, other, nn.Parameter(values[other].detach().clone()))
        for link in links:
            parametrize.register_parametrization(module, other, link, unsafe=True)
    return True


def unparametrize(module: nn.Module) -> None:
    """Make all parametrizations of ``module`` permanent, in place.

    PyTorch's own function would remove the property from the class, which deep copies share.
    """
    if not parametrize.is_parametrized(module):
        return
    attached = cast(nn.ModuleDict, module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in attached}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model`` whose tensors can be parametrized independently.

    ``copy.deepcopy`` alone shares the classes that parametrizations make, and so their properties.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return twin
