"""Convert a user's net to the form techniques need: one input, layers with stored weights, plain norms.

Nets come wrapped (``DataParallel``, ``torch.compile``), with weights that are made of other tensors at
every run (weight norm, masks, standardization), with norms that hold their activation, and with
branches to be merged before deployment. None of it changes what the net computes. Each step here is
taken only where the outputs stay what they were.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from penjing.errors import PenjingError
from penjing.models.wrappers import unwrapped
from penjing.net import layers
from penjing.net.observation import hooked
from penjing.tasks import outputs
from penjing.tasks.task import misfit

STOCK_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""PyTorch's batch norms by the number of axes of their input."""
STOCK_LAYERS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Linear.forward)
MERGES = ("reparameterize", "switch_to_deploy")
"""Names of methods by which nets such as RepVGG (Ding et al. 2021, arXiv:2101.03697) merge their
branches."""


def plain(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of ``model`` in evaluation mode, with equal outputs, that techniques can work on.

    Wrappers are removed, parametrizations and masks made permanent (masked layers are marked
    ``sparse``), branches merged where modules offer it, norms with an activation split in two,
    ``SyncBatchNorm`` made ordinary, and weights that a layer computes at every run stored.

    Args:
        model: the user's net on any device; it is not changed.
        example: one input, float32 ``[1, ...]``, on the model's device.

    Raises:
        PenjingError: the model is TorchScript, quantized by PyTorch, cannot be copied or run, or gives
            NaN.
    """
    made = _bare(_copied(unwrapped(model)), example)
    _check_numbers(made, example)  # lazy layers get their sizes here, too
    for module in made.modules():
        _bake(module)
    for step in (_merge, _split_norms, _store_weights):
        made = _unless_changed(made, example, step)
    return made


def _check_numbers(model: nn.Module, example: Tensor) -> None:
    guilty: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            guilty.append(name)

    named = {name: module for name, module in model.named_modules() if name}
    with hooked(named, look):
        found = _outputs(model, example)
    layers.check_finite(layers.compressible(model))
    if any(tensor.isnan().any() for tensor in found):
        raise PenjingError(
            f"outputs of layer {guilty[0] if guilty else type(model).__name__} are NaN or infinite on "
            "an image, and the model's are NaN; check its weights (negative variances of norms, "
            "overflows) and the preprocessing."
        )


def _copied(model: nn.Module) -> nn.Module:
    """Make a deep copy, even of modules that hold a result of autograd, as old weight norm does."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise PenjingError(
            f"the model {type(model).__name__} cannot be copied ({_first_line(error)}); keep open "
            "files, locks and tensors with a gradient out of its attributes."
        ) from error
    made.eval()
    for name, module in list(made.named_modules()):
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise PenjingError(
                f"layer {name} is a {type(module).__name__}: PyTorch has quantized this model "
                "already; give the float model that it was made from."
            )
        inner = unwrapped(module)
        if inner is not module and name:
            made.set_submodule(name, inner)
    return made


def _bare(model: nn.Module, example: Tensor) -> nn.Module:
    """Remove a ``forward(*inputs)`` around ``model``: the exporter needs the number of inputs."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds[:1]:
        return model
    children, own = list(model.children()), [*model._parameters, *model._buffers]
    if len(children) == 1 and not own and _same(_outputs(model, example), children[0], example):
        return _bare(children[0], example)
    return OneInput(model)


class OneInput(nn.Module):
    """Wrapper of ``module`` with one named input and the module's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Any:
        return self.module(image)


def _bake(module: nn.Module) -> None:
    """Store the weights that parametrizations, weight norms or masks of ``module`` compute."""
    layers.unparametrize(module)
    removals: dict[type, Callable[[nn.Module, str], object]] = {
        WeightNorm: remove_weight_norm,
        SpectralNorm: remove_spectral_norm,
        prune.BasePruningMethod: _remove_mask,
    }
    for hook in list(module._forward_pre_hooks.values()):
        for kind, remove in removals.items():
            if isinstance(hook, kind):
                name = getattr(hook, "name", None) or cast(Any, hook)._tensor_name
                remove(module, name)


def _remove_mask(module: nn.Module, name: str) -> None:
    prune.remove(module, name)
    if name == "weight":
        module.sparse = True  # type: ignore[assignment]


def _unless_changed(
    model: nn.Module, example: Tensor, step: Callable[[nn.Module, Tensor], bool]
) -> nn.Module:
    """Apply ``step``, which returns whether it changed anything; return ``model`` if outputs differ."""
    expected = _outputs(model, example)
    trial = layers.copied(model)
    try:
        changed = step(trial, example)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return model  # A foreign method failed on this net; the step is optional.
    return trial if changed and _same(expected, trial, example) else model


def _merge(model: nn.Module, _example: Tensor) -> bool:
    changed = False
    for module in list(model.modules()):
        for method in MERGES:
            merge = getattr(module, method, None)
            if callable(merge) and not _needs_arguments(merge):
                merge()
                changed = True
    model.eval()
    return changed


def _needs_arguments(method: Callable) -> bool:
    empty = inspect.Parameter.empty
    return any(p.default is empty for p in inspect.signature(method).parameters.values())


def _split_norms(model: nn.Module, example: Tensor) -> bool:
    """Split norms of a foreign class into a stock norm and the rest of their ``forward``."""
    foreign = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, _BatchNorm) and type(module) not in STOCK_NORMS.values()
    }
    axes: dict[str, int] = {}

    def keep(name: str, _norm: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        axes[name] = inputs[0].dim()

    with hooked(foreign, keep):
        _outputs(model, example)
    split = {name: _split(foreign[name], axes[name]) for name in axes}
    for name, module in split.items():
        if module is not None:
            model.set_submodule(name, module)
    return any(module is not None for module in split.values())


def _split(norm: _BatchNorm, axes: int) -> nn.Module | None:
    """Split ``norm`` into a stock norm and the rest; None where its ``forward`` cannot be traced."""
    stock = _stock(norm, axes)
    if type(norm).forward in (nn.SyncBatchNorm.forward, _BatchNorm.forward):
        return stock
    # The check of the number of axes branches on a value, which cannot be traced.
    norm.__dict__["_check_input_dim"] = lambda _: None
    try:
        rest = _rest(symbolic_trace(norm))
    # Tracing runs foreign code, which may fail in any way on missing values.
    except Exception:
        return None
    finally:
        del norm.__dict__["_check_input_dim"]
    if rest is None:
        return None
    return nn.Sequential(stock, *rest).eval() if rest else stock


def _stock(norm: _BatchNorm, axes: int) -> nn.Module:
    settings = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    stock = STOCK_NORMS[axes](*settings)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(stock, name, getattr(norm, name))
    return stock.eval()


def _rest(traced: GraphModule) -> list[nn.Module] | None:
    """Find the modules after the one ``F.batch_norm`` of ``traced``; None if it does not read the
    input itself, or is not alone."""
    graph = traced.graph
    source = next(node for node in graph.nodes if node.op == "placeholder")
    found = [node for node in graph.nodes if node.target in (F.batch_norm, torch.batch_norm)]
    if len(found) != 1 or found[0].args[:1] != (source,):
        return None
    found[0].replace_all_uses_with(source)
    for node in reversed(list(graph.nodes)):
        is_check = node.op == "call_function" and node.target is torch._assert
        if node is found[0] or is_check:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return _chain(traced, source)


def _chain(traced: GraphModule, source: Node) -> list[nn.Module]:
    steps = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    before, modules = source, []
    for node in steps:
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return [traced]
        modules.append(traced.get_submodule(str(node.target)))
        before = node
    return [module for module in modules if not isinstance(module, nn.Identity)]


@dataclass
class _Call:
    """Arguments of one call of PyTorch's convolution or matrix product by a layer's ``forward``."""

    function: Callable
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: dict[str, Any]


class _Calls(TorchFunctionMode):
    """Record the calls of PyTorch's convolution and matrix product."""

    _NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    _KINDS = (F.conv1d, F.conv2d, F.linear)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self._KINDS:
            given = dict(zip(self._NAMES, args, strict=False)) | (kwargs or {})
            tensors = (given.pop("input"), given.pop("weight"), given.pop("bias", None))
            self.found.append(_Call(func, *tensors, settings=given))
        return func(*args, **(kwargs or {}))


def _store_weights(model: nn.Module, example: Tensor) -> bool:
    """Store the weight of layers whose ``forward`` computes it of ``self.weight`` at every run, as
    weight standardization (Qiao et al. 2019, arXiv:1903.10520) does."""
    foreign = {
        name: layer
        for name, layer in layers.compressible(model).items()
        if type(layer).forward not in STOCK_LAYERS
    }
    made: dict[str, nn.Module] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        with _Calls() as calls, _unhooked(layer):
            layer(*inputs)
        plain_layer = _plain_layer(cast(layers.Layer, layer), inputs[0], calls.found)
        if plain_layer is not None:
            made[name] = plain_layer

    with hooked(foreign, look):
        _outputs(model, example)
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return bool(made)


def _plain_layer(layer: layers.Layer, x: Tensor, calls: list[_Call]) -> nn.Module | None:
    """Make a plain layer with the one weight of ``calls``; None if that is ``layer``'s own."""
    if len(calls) != 1 or calls[0].weight.data_ptr() == layer.weight.data_ptr():
        return None
    call = calls[0]
    made = _built(call)
    if call.input is x or (call.input.shape == x.shape and torch.equal(call.input, x)):
        return made
    pads = _pads(x, call.input)
    return None if pads is None else nn.Sequential(nn.ZeroPad2d(pads), made)


def _built(call: _Call) -> nn.Module:
    weight, bias = call.weight.detach().clone(), call.bias
    rows, columns, *kernel = weight.shape
    made: Any
    if call.function is F.linear:
        made = nn.Linear(columns, rows, bias=bias is not None, device=weight.device)
    else:
        kind: Any = nn.Conv1d if call.function is F.conv1d else nn.Conv2d
        inputs = columns * call.settings.get("groups", 1)
        options = {"bias": bias is not None, "device": weight.device, **call.settings}
        made = kind(inputs, rows, tuple(kernel), **options)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made.eval()


def _pads(x: Tensor, padded: Tensor) -> tuple[int, int, int, int] | None:
    """Return the zeros (left, right, top, bottom) around ``x`` in ``padded``; None if they differ in
    more."""
    if x.dim() != 4 or padded.dim() != 4:
        return None
    height, width = (a - b for a, b in zip(padded.shape[2:], x.shape[2:], strict=True))
    for top, left in ((height // 2, width // 2), (height - height // 2, width - width // 2)):
        pads = (left, width - left, top, height - top)
        if min(pads) >= 0 and torch.equal(F.pad(x, pads), padded):
            return pads
    return None


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return outputs.tensors(_run(model, example))


def _run(model: nn.Module, example: Tensor) -> Any:
    try:
        return model(example)
    except Exception as error:  # whatever foreign code raises
        raise PenjingError(
            f"the model {type(model).__name__} cannot be run on an input of shape "
            f"{list(example.shape)} ({_first_line(error)}); "
            f"{misfit(model, 'give it the input that it takes')}."
        ) from error


def _same(expected: list[Tensor], model: nn.Module, example: Tensor) -> bool:
    try:
        return outputs.same(expected, _outputs(model, example))
    except PenjingError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _unhooked(module: nn.Module) -> Iterator[None]:
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    try:
        yield
    finally:
        module._forward_hooks = hooks
