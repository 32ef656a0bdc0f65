"""Read ONNX files: a graph, and weights in the file or in others beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from penjing.errors import PenjingError


def read(path: Path, name: str | Path) -> onnx.ModelProto:
    """Read the graph in ``path``, without weights in other files; errors call it ``name``.

    Raises:
        PenjingError: the file cannot be read, or is no ONNX model.
    """
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise PenjingError(f"{name} cannot be read: {error.strerror or error}.") from error
    except DecodeError as error:
        raise PenjingError(
            f"{name} is no ONNX file, or is damaged; expected a .onnx or .penjing file: copy or "
            "export it again."
        ) from error
    if not model.HasField("graph"):
        raise PenjingError(f"{name} holds no graph; expected an ONNX model: export it again.")
    return model


def inputs(model: onnx.ModelProto) -> dict[str, bool]:
    """Return the names of the inputs to feed, and whether the file gives their number of axes.

    Old files list their weights among the inputs, too.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    fed = [value for value in model.graph.input if value.name not in weights]
    return {
        value.name: value.type.tensor_type.HasField("shape")
        or not value.type.HasField("tensor_type")
        for value in fed
    }


def data_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Find the files beside ``path`` that hold weights of its ``model``, each once, sorted.

    Raises:
        PenjingError: one is missing, or lies outside the folder of ``path``.
    """
    locations = {}
    for tensor in _tensors(model):
        if uses_external_data(tensor):
            locations[ExternalDataInfo(tensor).location] = tensor.name
    for location, tensor_name in locations.items():
        if _leaves(location):
            raise PenjingError(
                f"{path} keeps its weight {tensor_name} in {location}, which is outside its folder; "
                "save the model with its weights inside, or beside it."
            )
        if not (path.parent / location).is_file():
            raise PenjingError(
                f"{path} keeps its weight {tensor_name} in {location}, which is missing from "
                f"{path.parent}; copy that file there, too."
            )
    return sorted(path.parent / location for location in locations)


def _leaves(location: str) -> bool:
    path = Path(location)
    return path.is_absolute() or bool(path.drive) or ".." in path.parts


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _of_attribute(attribute)


def _of_attribute(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    for graph in graphs:
        yield from _of_graph(graph)
