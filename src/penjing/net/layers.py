"""What penjing knows about a layer: its weights, how they are stored, what feeds them.

A compressed model stays a plain ``nn.Module``. What a plain layer cannot say about itself is kept in
three attributes of the layer: ``weight_format`` (on which grid its weights lie), ``input_quantizer``
(a child module that puts its input on a grid, called by a forward pre-hook) and ``sparse`` (its zero
weights are to stay zero in later training).
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
    """The convolutional and fully connected layers of ``model`` by dotted name, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def check_finite(found: dict[str, Layer]) -> None:
    """Raise ``PenjingError`` where the weights of a layer ``found`` hold NaN or infinity."""
    for name, layer in found.items():
        if not torch.isfinite(layer.weight).all():
            raise PenjingError(f"the weights of layer {name} hold NaN or infinite values")


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of the convolution reads its own input channel alone."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return False
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def is_sparse(layer: Layer) -> bool:
    """Whether zeros of ``layer`` are meant: it is marked ``sparse``, or a parametrization on its weights
    gives zeros."""
    masked = parametrize.is_parametrized(layer, "weight") and bool((layer.weight == 0).any())
    return masked or getattr(layer, "sparse", False)


def original(module: nn.Module, name: str = "weight") -> Tensor:
    """The trainable tensor behind ``module.name``: below all parametrizations, if it has any."""
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

    Those registered after it stay on. Returns whether there was one: False means that a technique
    attached later has already folded it.
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
    """Make all parametrizations of ``module`` permanent.

    Not by PyTorch's own function: it takes the property off the class, which deep copies of the
    module share.
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
    """A deep copy on which other tensors can be parametrized than on ``model``.

    A copy of PyTorch's own shares the classes that parametrizations make, and so their properties.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return twin
