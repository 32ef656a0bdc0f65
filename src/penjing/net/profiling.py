"""Count a model's parameters, MACs and bytes, layer by layer, without computing its outputs."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from penjing import models
from penjing.errors import PenjingError
from penjing.net.layers import CodebookWeights, IntegerWeights
from penjing.tasks.outputs import evaluating
from penjing.tasks.preprocessing import Size, sides

Kind = Literal["conv", "linear", "other"]

aten = torch.ops.aten
FLOPS = {
    **flop_registry,
    # Not in PyTorch's own list, although attention on the CPU runs as this operator.
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
}
"""Functions that count floating point operations, two a multiply-accumulate, by operator."""


@dataclass
class LayerProfile:
    """Costs of one layer: a module without children, or one that owns parameters or multiplies."""

    name: str
    kind: Kind
    shape: list[int]
    """Shape of the layer's (last) output for one image."""
    params: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    """Bytes of the layer's outputs for one image, over all its calls."""


@dataclass
class Profile:
    """Costs of one forward pass on one image.

    ``macs`` counts the multiply-accumulates of convolutions and matrix products (attention's too).
    ``params`` counts a shared parameter once, at the first layer that has it. ``weight_bytes`` are
    those of the parameters in their ``weight_format`` where they have one, else in their type;
    buffers are not counted.

    ``peak_activation_bytes`` is the most that must be held at one moment, operator by operator in
    the order PyTorch runs them, none fused. An activation is the input and everything computed from
    it (so no weights), held from the operator that writes it to the last one that reads it, the
    model's output to the end. Memory is counted by storage: views add nothing, an in-place operator
    writes where it reads, and results nobody reads (the indices of max pooling) are not counted.
    """

    name: str
    layers: list[LayerProfile]
    params: int
    macs: int
    weight_bytes: int
    peak_activation_bytes: int

    @property
    def kinds(self) -> dict[str, dict[str, int]]:
        """Sums of ``params``, ``macs`` and ``weight_bytes`` over the layers of each kind."""
        keys = ("params", "macs", "weight_bytes")
        return {
            kind: {k: sum(getattr(x, k) for x in self.layers if x.kind == kind) for k in keys}
            for kind in get_args(Kind)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, for JSON."""
        return asdict(self) | {"kinds": self.kinds}


def profile(model: nn.Module, example: Tensor, name: str | None = None) -> Profile:
    """Count the costs of ``model`` in evaluation mode on one image; raises what the model raises.

    Args:
        example: input batch ``[N, ...]``; its first image is used.
        name: name of the profile; None is the class of the model.
    """
    parameter = next(model.parameters(), None)
    device = example.device if parameter is None else parameter.device
    image = example[:1].detach().to(device).clone()
    if parameter is not None and parameter.is_floating_point() and image.is_floating_point():
        image = image.to(parameter.dtype)
    try:
        trace = _trace(model, image, FakeTensorMode(allow_non_fake_inputs=True))
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ):
        # The model branches on values, so values must be computed.
        trace = _trace(model, image, None)
    layers = _layers(model, trace)
    return Profile(
        name=name or type(model).__name__,
        layers=layers,
        params=sum(layer.params for layer in layers),
        macs=sum(layer.macs for layer in layers),
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        peak_activation_bytes=trace.peak(),
    )


def profile_spec(spec: str, image_size: Size | None = None) -> Profile:
    """Count the costs of the model that ``spec`` names (see ``penjing.models.load``), on one image.

    Args:
        image_size: side of the image, or height and width, px; None is the model's own.

    Raises:
        PenjingError: the model is unknown, or its image size is and is not given, or it does not
            take that size.
    """
    expected = models.preprocessing(spec)
    if expected is None and image_size is None:
        raise PenjingError(f"{spec}: does not say what image size it takes; give image_size.")
    height, width = sides(image_size or (expected.size if expected else 0))
    channels = expected.channels if expected else 3
    model = models.load(spec)
    try:
        return profile(model, torch.zeros(1, channels, height, width), name=spec)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise PenjingError(
            f"{spec}: does not take images of {channels}x{height}x{width} ({reason}); "
            "give another image_size."
        ) from error


class _Trace(TorchDispatchMode):
    """Record the operators that run: their MACs by module, the storages they read and write."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.macs: dict[str, int] = defaultdict(int)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.modules = [""]
        self.steps = 0
        self._written: dict[int, int] = {}
        self._last_read: dict[int, int] = {}
        # Tensors are kept, so that no storage is freed and its address used again.
        self._activations: dict[int, Tensor] = {}
        self._write(image)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return out
        if func._overloadpacket in FLOPS:
            flops = FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
            self.macs[self.modules[-1]] += flops // 2
        read = [t for t in _tensors((args, kwargs)) if _storage(t) in self._activations]
        if read:
            self.steps += 1
            for tensor in read:
                self._last_read[_storage(tensor)] = self.steps
            for tensor in _tensors(out):
                self._write(tensor)
        return out

    def finish(self, output: Any) -> None:
        """Count the model's ``output`` as read at the end."""
        for tensor in _tensors(output):
            self._last_read[_storage(tensor)] = self.steps

    def peak(self) -> int:
        """Return the most bytes of activations held during one operator."""
        change = [0] * (self.steps + 2)
        for storage, last in self._last_read.items():
            if storage in self._activations:
                size = self._activations[storage].untyped_storage().nbytes()
                change[self._written[storage]] += size
                change[last + 1] -= size
        held = most = 0
        for difference in change:
            held += difference
            most = max(most, held)
        return most

    def _write(self, tensor: Tensor) -> None:
        self._activations.setdefault(_storage(tensor), tensor)
        self._written.setdefault(_storage(tensor), self.steps)


def _trace(model: nn.Module, image: Tensor, fake: FakeTensorMode | None) -> _Trace:
    image = image if fake is None else fake.from_tensor(image)
    trace = _Trace(image)
    with _evaluation(model), _follow_modules(model, trace):
        if fake is None:
            with trace:
                trace.finish(model(image))
        else:
            with fake, trace:
                trace.finish(model(image))
    return trace


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fast path hides the matrix products of attention in one operator.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _follow_modules(model: nn.Module, trace: _Trace) -> Iterator[None]:
    def follow(name: str, module: nn.Module) -> None:
        owner = _owner(name)

        def enter(_module: nn.Module, _inputs: Any) -> None:
            trace.modules.append(owner)

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            trace.modules.pop()
            if owner == name:
                trace.outputs[name] += _tensors(output)

        stack.enter_context(module.register_forward_pre_hook(enter, prepend=True))
        stack.enter_context(module.register_forward_hook(leave, always_call=True))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            follow(name, module)
        yield


def _layers(model: nn.Module, trace: _Trace) -> list[LayerProfile]:
    parameters = _parameters_by_layer(model)
    layers = []
    for name, module in model.named_modules():
        leaf = name in trace.outputs and not any(module.children())
        if _owner(name) == name and (leaf or parameters[name] or trace.macs[name]):
            outputs = trace.outputs[name]
            layers.append(
                LayerProfile(
                    name=name,
                    kind=_kind(module),
                    shape=list(outputs[-1].shape) if outputs else [],
                    params=sum(p.numel() for p in parameters[name]),
                    macs=trace.macs[name],
                    weight_bytes=sum(_bytes(p, module) for p in parameters[name]),
                    activation_bytes=sum(t.numel() * t.element_size() for t in outputs),
                )
            )
    return layers


def _parameters_by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    parameters: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parameters[_owner(name.rpartition(".")[0])].append(parameter)
    return parameters


def _owner(name: str) -> str:
    """Return the layer that a parametrization belongs to; any other module is its own."""
    return f".{name}".partition(".parametrizations")[0].removeprefix(".")


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "linear" if isinstance(module, nn.Linear) else "other"


def _bytes(parameter: nn.Parameter, module: nn.Module) -> int:
    weight_format = getattr(module, "weight_format", None)
    is_weight = parameter.dim() > 1
    if is_weight and isinstance(weight_format, IntegerWeights | CodebookWeights):
        table = (
            weight_format.scale
            if isinstance(weight_format, IntegerWeights)
            else weight_format.values
        )
        return math.ceil(parameter.numel() * weight_format.bits / 8) + table.nbytes
    return parameter.nbytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def table(profiles: Iterable[Profile]) -> Table:
    """Make a table of parameters, MACs, weights and peak activations of each model, in total and by
    kind."""
    summary = Table("model", "params", "MACs, M", "weights, KB", "activations, KB", box=SIMPLE_HEAD)
    summary.columns[0].overflow = "fold"
    for column in summary.columns[1:]:
        column.justify = "right"
    for p in profiles:
        total = (p.params, p.macs, p.weight_bytes, p.peak_activation_bytes)
        summary.add_row(p.name, *_readable(*total))
        for kind, sums in p.kinds.items():
            summary.add_row(f"  {kind}", *_readable(*sums.values()), style="dim")
    return summary


def layer_table(profile: Profile) -> Table:
    """Make a table with one line a layer, and the total, whose activations are the peak."""
    columns = ("layer", "kind", "output", "params", "MACs, M", "weights, KB", "activations, KB")
    detail = Table(*columns, box=SIMPLE_HEAD)
    detail.columns[0].overflow = "fold"
    for column in detail.columns[3:]:
        column.justify = "right"
    for layer in profile.layers:
        numbers = (layer.params, layer.macs, layer.weight_bytes, layer.activation_bytes)
        shape = _side_by_side(layer.shape[1:])
        detail.add_row(layer.name or profile.name, layer.kind, shape, *_readable(*numbers))
    detail.add_section()
    total = (profile.params, profile.macs, profile.weight_bytes, profile.peak_activation_bytes)
    detail.add_row("total, peak", "", "", *_readable(*total))
    return detail


def _readable(
    params: int, macs: int, weight_bytes: int, activation_bytes: int | None = None
) -> Sequence[str]:
    return (
        f"{params:,}",
        f"{macs / 1e6:,.2f}",
        f"{weight_bytes / 1e3:,.1f}",
        "" if activation_bytes is None else f"{activation_bytes / 1e3:,.1f}",
    )


def to_csv(profiles: Iterable[Profile]) -> str:
    """Write the layers of the models as CSV with a header, one line a layer; shapes as
    ``1x64x32x32``."""
    text = io.StringIO()
    columns = ["model", *(field.name for field in fields(LayerProfile))]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for p in profiles:
        for layer in p.layers:
            row = {"model": p.name, **asdict(layer), "shape": _side_by_side(layer.shape)}
            writer.writerow(row)
    return text.getvalue()


def _side_by_side(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)
