"""Export a PyTorch model's graph to ONNX once for each structure, and fill it with values.

``torch.onnx.export`` takes seconds, most of them for the translation of a graph that techniques which
change values alone leave as it was. So the graph is kept without the values of parameters and buffers,
under a hash of the program that ``torch.export`` traced, with the name of the parameter behind each
initializer and whether the graph reads it transposed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
import torch._export.utils
from onnxscript import optimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import penjing
from penjing.errors import PenjingError

LOGGERS = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "torch.export")
"""Loggers that print programs and advice on how to change the exporter."""
KEPT = 8
"""Number of structures whose graphs are kept; the last used ones."""
TRANSPOSED = ".T"
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second input may be a layer's weight."""


@dataclass(frozen=True)
class Parameter:
    """Parameter or buffer ``name`` of the model behind a value of the graph, which reads its
    transpose if it is ``transposed``."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class ExportedGraph:
    """``graph`` with all values, and the ``sources`` of its initializers by their names."""

    graph: ir.Model
    sources: dict[str, Parameter]


def exported(model: nn.Module, example: Tensor, opset: int) -> ExportedGraph:
    """Export the float graph of ``model`` (on the CPU, in evaluation mode), optimized, not lowered.

    Args:
        model: the model, whose parameters are put in alphabetical order.
        example: one input, float32 ``[1, ...]``; the first axis of the graph's input is free.
        opset: version of ONNX's operators.

    Raises:
        PenjingError: the model cannot be exported.
    """
    for module in model.modules():  # techniques may have changed the order of parameters
        module._parameters = dict(sorted(module._parameters.items()))
    program = _traced(model, example)
    template = _template(_Traced(_key(program, opset), program, opset, model, example))
    return _filled(template, model)


class _Traced:
    """A traced program, hashed and compared by its ``key``."""

    def __init__(
        self,
        key: str,
        program: torch.export.ExportedProgram,
        opset: int,
        model: nn.Module,
        example: Tensor,
    ) -> None:
        self.key, self.program, self.opset = key, program, opset
        self.kind, self.shape = type(model).__name__, tuple(example.shape)
        first: dict[int, str] = {}
        self.names = {n: first.setdefault(id(t), n) for n, t in _state(model).items()}
        """First name of the tensor behind each name of a parameter or buffer; tensors may be shared."""

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Traced) and self.key == other.key


def _key(program: torch.export.ExportedProgram, opset: int) -> str:
    """Hash everything that the ONNX graph depends on, except values of parameters and buffers."""
    digest = hashlib.sha256(f"{opset} {program.graph_signature}".encode())
    for node in program.graph.nodes:
        digest.update(f"{node.format_node()} {_type(node.meta.get('val'))}\n".encode())
    for name, value in sorted(program.constants.items()):
        digest.update(name.encode() + _bytes(value))
    return digest.hexdigest()


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    return ", ".join(map(_type, value)) if isinstance(value, list | tuple) else str(value)


def _bytes(value: object) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return raw.numpy().tobytes()


def _traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    # An example of one image would fix the batch axis at one, another memory order its strides.
    pair = torch.cat([example, example]).contiguous()
    # The exporter prints the part of a program that it could trace before it failed.
    unprinted = contextlib.redirect_stderr(io.StringIO())
    exporting = _exporting(type(model).__name__, tuple(example.shape))
    with exporting, unprinted, torch.no_grad(), _AttentionOfFourAxes():
        return torch.export.export(
            model, (pair,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )


class _AttentionOfFourAxes(TorchFunctionMode):
    """Run attention as of ``[images, heads, tokens, width]``, the only form the exporter knows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        attend: Any = F.scaled_dot_product_attention
        if func is not attend or args[0].dim() == 4:
            return func(*args, **kwargs)
        query, _, value = args[:3]
        if args[3:]:
            kwargs["attn_mask"] = args[3]
        mask = kwargs.get("attn_mask")
        if query.dim() > 4 and mask is not None and mask.dim() > 2:
            lead = (*query.shape[:-2], *mask.shape[-2:])
            kwargs["attn_mask"] = mask.expand(lead).flatten(0, -4)
        made = attend(*(_with_four_axes(one) for one in args[:3]), *args[4:], **kwargs)
        return made.reshape(*query.shape[:-1], value.shape[-1])


def _with_four_axes(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -4) if tensor.dim() > 4 else tensor[(None,) * (4 - tensor.dim())]


@functools.cache
def _keep_signatures() -> None:
    """Cache the exporter's signatures of its translations of PyTorch's operators, which it would read
    from their source at every export; that takes a second."""
    kind = onnxscript.TracedOnnxFunction
    if isinstance(read := vars(kind).get("function_ir"), property) and read.fget:
        kept = functools.cached_property(read.fget)
        kept.__set_name__(kind, "function_ir")
        kind.function_ir = kept  # type: ignore[assignment, method-assign]
    with contextlib.suppress(ImportError, AttributeError):  # not in every version of PyTorch
        schemas: Any = importlib.import_module("torch.onnx._internal.exporter._schemas")
        schemas.op_signature_from_function = functools.cache(schemas.op_signature_from_function)


@contextlib.contextmanager
def _one_look_at_operators() -> Iterator[None]:
    """Let PyTorch load its composite operators once an export, not once for each of 30 namespaces, which
    takes half a second. A later export loads them again: foreign code may register more."""
    look = getattr(torch._export.utils, "_materialize_cpp_cia_ops", None)
    if look is None:
        yield
        return
    torch._export.utils._materialize_cpp_cia_ops = functools.cache(look)
    try:
        yield
    finally:
        torch._export.utils._materialize_cpp_cia_ops = look


@functools.lru_cache(KEPT)
def _template(traced: _Traced) -> ExportedGraph:
    _keep_signatures()
    with _exporting(traced.kind, traced.shape):
        program = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=["image"],
            opset_version=traced.opset,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        model, program = program.model, None
        del traced.program  # and with it the weights of the first model of this structure
        sources = _take_values_out(model.graph, traced.names)
        optimizer.optimize(model)
        _drop_unread(model.graph, sources)
    _name_batch_axis(model.graph)
    model.ir_version = 13 if traced.opset == 25 else 10
    return ExportedGraph(model, sources)


def _take_values_out(graph: ir.Graph, names: Mapping[str, str]) -> dict[str, Parameter]:
    """Turn the parameters among the initializers into inputs, so that no optimization reads them, and
    those that a product reads transposed into inputs of their own."""
    sources = {}
    for name, value in list(graph.initializers.items()):
        if name in names:
            sources[name] = Parameter(names[name])
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    for node in list(graph):
        flip = node.inputs[1].producer() if _is_product(node) else None  # type: ignore[union-attr]
        source = flip.inputs[0] if flip is not None and _is_matrix_transpose(flip) else None
        if source is not None and source.name in sources:
            name = f"{source.name}{TRANSPOSED}"
            if name not in sources:
                sources[name] = Parameter(sources[str(source.name)].name, transposed=True)
                old = node.inputs[1]
                graph.inputs.append(ir.val(name, shape=old.shape, type=old.type))  # type: ignore
            value = next(one for one in graph.inputs if one.name == name)
            node.replace_input_with(1, value)
    return sources


def _is_product(node: ir.Node) -> bool:
    return node.op_type in PRODUCTS and len(node.inputs) > 1 and node.inputs[1] is not None


def _is_matrix_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _drop_unread(graph: ir.Graph, sources: dict[str, Parameter]) -> None:
    for value in list(graph.inputs):
        if value.name in sources and not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
            del sources[value.name]


def _name_batch_axis(graph: ir.Graph) -> None:
    """Name the batch axis ``batch``, which the exporter numbered."""
    number = graph.inputs[0].shape[0]  # type: ignore[index]
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if size == number:
                value.shape[axis] = "batch"  # type: ignore[index]


def _filled(template: ExportedGraph, model: nn.Module) -> ExportedGraph:
    """Copy the ``template`` and fill it with the parameters and buffers of ``model``."""
    filled = template.graph.clone()
    graph, state = filled.graph, _state(model)
    constants = list(graph.initializers.values())
    graph.initializers.clear()
    for value in list(graph.inputs):
        source = template.sources.get(str(value.name))
        if source is not None:
            array = state[source.name].detach().contiguous().numpy()
            array = array.T.copy() if source.transposed else array.copy()
            graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=value.name)
            graph.register_initializer(value)
    for value in constants:
        graph.register_initializer(value)
    sources = _with_short_names(graph, template.sources)
    if any(_is_constant(node) for node in graph):
        optimizer.fold_constants_ir(filled)
    return ExportedGraph(filled, sources)


def _with_short_names(graph: ir.Graph, sources: dict[str, Parameter]) -> dict[str, Parameter]:
    """Give transposed weights the name of the weight, unless the graph reads both."""
    renamed = {}
    for name, source in sources.items():
        short = name.removesuffix(TRANSPOSED)
        if source.transposed and short not in graph.initializers:
            value = graph.initializers.pop(name)
            value.name = name = short
            graph.register_initializer(value)
        renamed[name] = source
    return renamed


def _is_constant(node: ir.Node) -> bool:
    """Whether all inputs of ``node`` are initializers."""
    return bool(node.inputs) and all(v is None or v.is_initializer() for v in node.inputs)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


@contextlib.contextmanager
def _exporting(kind: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Keep the exporter's progress and notices off the user's terminal, and turn its errors into one
    sentence."""
    # Attention in plain operators: what the exporter makes of the fused ones has other strides, on which
    # the views that were traced are impossible.
    attention = sdpa_kernel(SDPBackend.MATH)
    unprinted = contextlib.redirect_stdout(io.StringIO())
    with _without_logs(), unprinted, attention, _one_look_at_operators():
        try:
            yield
        except Exception as error:  # whatever the exporter, or foreign code under it, raises
            raise PenjingError(
                f"the model {kind} cannot be exported to ONNX for an input of shape {shape} "
                f"({_first_cause(error)}); {_where(error)}."
            ) from error


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_cause(error: BaseException) -> str:
    """Return the first line of the error that the exporter wraps in pages of advice."""
    line = next(iter(str(_causes(error)[-1]).strip().splitlines()), "")
    return f"{type(_causes(error)[-1]).__name__}: {line[:300]}"


def _causes(error: BaseException) -> list[BaseException]:
    """Return ``error`` and the chain of its causes."""
    return [error] if error.__cause__ is None else [error, *_causes(error.__cause__)]


def _where(error: BaseException) -> str:
    """Name the line of the model to change: the innermost one that is not the exporter's own."""
    stacks = [traceback.extract_tb(cause.__traceback__) for cause in _causes(error)]
    own = {Path(str(package.__file__)).parent for package in (torch, onnxscript, ir, penjing)}
    frames = [frame for stack in stacks for frame in stack if frame.line]
    lines = [frame for frame in frames if own.isdisjoint(Path(frame.filename).parents)]
    if not lines:
        return "change the part of its forward that is named here"
    last = lines[-1]
    return f"change line {last.lineno} of {last.filename}: {last.line}"
