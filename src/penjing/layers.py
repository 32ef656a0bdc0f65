"""What penjing knows about a layer: its weights, how they are stored, what feeds them.

A compressed model stays a plain ``nn.Module``. What a plain layer cannot say about itself is kept in
three attributes of the layer: ``weight_format`` (on which grid its weights lie), ``input_quantizer``
(a child module that puts its input on a grid, called by a forward pre-hook) and ``sparse`` (its zero
weights are to stay zero in later training).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def batch_norm_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of (layer, batch norm) where the norm's input is that very layer's output tensor.

    Found by running ``example`` (``[N, ...]``) once: no tracing, so any module will do.
    """
    produced: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)

    def after_layer(name: str):
        def hook(_module, _inputs, output):
            calls[name] = calls.get(name, 0) + 1
            # The tensor is kept so that its id cannot be given to another one.
            produced[id(output)] = (name, output)

        return hook

    def before_norm(name: str):
        def hook(_module, inputs):
            if id(inputs[0]) in produced:
                pairs.append((produced[id(inputs[0])][0], name))

        return hook

    hooks = [m.register_forward_hook(after_layer(n)) for n, m in compressible(model).items()]
    hooks += [
        m.register_forward_pre_hook(before_norm(n))
        for n, m in model.named_modules()
        if isinstance(m, norms)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [(layer, norm) for layer, norm in pairs if calls[layer] == 1]


def fold_batch_norm(model: nn.Module, example: Tensor) -> list[str]:
    """Fold every batch norm that directly follows a layer into that layer, in place.

    The norm becomes ``nn.Identity``. Folding is checked on ``example``: pairs whose folding changes
    the model's output (the layer's output is also read elsewhere) are left as they are. Returns the
    names of the layers that took a norm in.
    """
    pairs = batch_norm_pairs(model, example)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = _first_tensor(model(example))
        undo = [_fold_pair(model, layer, norm) for layer, norm in pairs]
        if not _close(_first_tensor(model(example)), expected):
            # Rare: find the guilty ones by folding one by one.
            for restore in reversed(undo):
                restore()
            pairs = [pair for pair in pairs if _folds(model, *pair, example, expected)]
    model.train(training)
    return [layer for layer, _ in pairs]


def _folds(model: nn.Module, layer: str, norm: str, example: Tensor, expected: Tensor) -> bool:
    """Fold one pair if that leaves the output as it was."""
    restore = _fold_pair(model, layer, norm)
    if _close(_first_tensor(model(example)), expected):
        return True
    restore()
    return False


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= 1e-3 * expected.abs().max()).all())


def _fold_pair(model: nn.Module, layer_name: str, norm_name: str) -> Callable[[], None]:
    """Fold the norm into the layer; the result puts both back."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    weight, bias = original(layer).detach().clone(), layer.bias

    def restore() -> None:
        model.set_submodule(norm_name, norm)
        set_original(layer, "weight", weight)
        layer.bias = cast(nn.Parameter, bias)

    _absorb(layer, norm)
    model.set_submodule(norm_name, nn.Identity())
    return restore


def _absorb(layer: Any, norm: Any) -> None:
    mean, var = norm.running_mean, norm.running_var
    gain = norm.weight if norm.weight is not None else torch.ones_like(mean)
    shift = norm.bias if norm.bias is not None else torch.zeros_like(mean)
    factor = gain / torch.sqrt(var + norm.eps)
    weight = original(layer)
    bias = layer.bias if layer.bias is not None else torch.zeros_like(mean)
    scaled = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    set_original(layer, "weight", scaled.detach())
    layer.bias = nn.Parameter(((bias - mean) * factor + shift).detach())


def _first_tensor(output: object) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))  # type: ignore
    return output
