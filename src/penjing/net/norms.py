"""Fold batch norms into the layers whose output they alone read.

Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
inference" (arXiv:1712.05877), section 3.2, for a network as it is deployed. Readers of an output are
found among the operators that a run of the model executes: a norm folds only where nothing else reads
the layer's output, not even an activation in place or the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

from penjing.net import layers
from penjing.net.layers import original, set_original
from penjing.tasks import outputs
from penjing.tasks.outputs import evaluating

NORMS = (_BatchNorm, FrozenBatchNorm2d)
STOCK = (_BatchNorm.forward, nn.SyncBatchNorm.forward, FrozenBatchNorm2d.forward)
"""Forward methods that only normalize."""
TRIALS = 2
"""Number of images of noise on which a folded net is compared, beside the example."""


def fold_batch_norm(model: nn.Module, example: Tensor) -> list[str]:
    """Fold every batch norm that alone reads a layer's output into that layer, in place.

    The norm becomes ``nn.Identity``. All outputs are compared before and after, on ``example``
    (``[N, ...]``) and on images of noise; a pair that changes them stays as it is. Returns the names
    of the layers that took a norm in.
    """
    pairs = foldable(model, example)
    if not pairs:
        return []
    images = _images(example)
    expected = _outputs(model, images)
    undo = [_fold(model, layer, norm) for layer, norm in pairs]
    if not outputs.same(expected, _outputs(model, images)):
        # Rare: find the pairs that change the outputs by folding one by one.
        for restore in reversed(undo):
            restore()
        pairs = [pair for pair in pairs if _folds(model, *pair, images, expected)]
    return [layer for layer, _ in pairs]


def foldable(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Find the pairs of names (layer, norm) in which only the norm reads the layer's output, in
    running order."""
    trace = _Trace(model)
    returned = trace.run(example)
    calls = Counter(name for name, _ in trace.made) + Counter(norm for norm, _ in trace.normed)
    tied = _tied(model)
    pairs = []
    for norm, storage in trace.normed:
        layer = trace.maker.get(storage)
        alone = trace.readers.get(storage) == {norm} and storage not in returned
        once = layer is not None and calls[layer] == 1 and calls[norm] == 1
        if alone and once and layer not in tied and _fits(model, cast(str, layer), norm):
            pairs.append((cast(str, layer), norm))
    return pairs


class _Trace(TorchDispatchMode):
    """Record the modules that read the output of each layer, operator by operator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.made: list[tuple[str, int]] = []
        self.normed: list[tuple[str, int]] = []
        """Name of each norm and the storage that it read, at every call; ``made`` likewise for layers
        and the storage that they wrote."""
        self.maker: dict[int, str] = {}
        self.readers: dict[int, set[str]] = {}
        self._inside = ""
        # Tensors are kept, so that no storage is freed and its address used again.
        self._kept: list[Tensor] = []

    def run(self, example: Tensor) -> set[int]:
        """Run the model; returns the storages of its outputs."""
        with ExitStack() as stack:
            for name, layer in layers.compressible(self.model).items():
                stack.enter_context(layer.register_forward_hook(self._after_layer(name)))
            for name, norm in self.model.named_modules():
                if isinstance(norm, NORMS):
                    stack.enter_context(norm.register_forward_pre_hook(self._before_norm(name)))
                    stack.enter_context(
                        norm.register_forward_hook(self._after_norm, always_call=True)
                    )
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self)
            returned = outputs.tensors(self.model(example.contiguous()))
        self._kept += returned
        return {_storage(tensor) for tensor in returned}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not _is_view(func):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and (storage := _storage(tensor)) in self.maker:
                    self.readers.setdefault(storage, set()).add(self._inside)
        return func(*args, **kwargs)

    def _after_layer(self, name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                storage = _storage(output)
                self.made.append((name, storage))
                self.maker[storage] = name
                self.readers.pop(storage, None)
                self._kept.append(output)

        return hook

    def _before_norm(self, name: str) -> Callable:
        def hook(_module: nn.Module, inputs: Any) -> None:
            self._inside = name
            if inputs and isinstance(inputs[0], Tensor):
                self.normed.append((name, _storage(inputs[0])))
                self._kept.append(inputs[0])

        return hook

    def _after_norm(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._inside = ""


def _is_view(func: Any) -> bool:
    """Whether the operator only returns a view of a tensor."""
    results = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return bool(results) and not any(alias.is_write for alias in results)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tied(model: nn.Module) -> set[str]:
    """Find the layers that share a parameter with another module."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(parameter) for parameter in module.parameters(recurse=False))
    return {
        name
        for name, layer in layers.compressible(model).items()
        if any(owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False))
    }


def _fits(model: nn.Module, layer: str, norm: str) -> bool:
    """Whether the norm only normalizes, with running statistics of each output of the layer."""
    module = model.get_submodule(norm)
    mean = module.running_mean
    if type(module).forward not in STOCK:
        return False
    return mean is not None and len(mean) == len(model.get_submodule(layer).weight)  # type: ignore


def _images(example: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(example.shape, generator=generator) for _ in range(TRIALS)]
    spread = float(example.float().std()) if example.numel() > 1 else 1.0
    return [example, *((spread or 1.0) * one.to(example) for one in noise)]


def _outputs(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
    with evaluating(model):
        return [tensor for image in images for tensor in outputs.tensors(model(image))]


def _folds(
    model: nn.Module, layer: str, norm: str, images: list[Tensor], expected: list[Tensor]
) -> bool:
    """Fold one pair if the outputs stay as they were."""
    restore = _fold(model, layer, norm)
    if outputs.same(expected, _outputs(model, images)):
        return True
    restore()
    return False


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> Callable[[], None]:
    """Fold the norm into the layer; returns a function that restores both."""
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
