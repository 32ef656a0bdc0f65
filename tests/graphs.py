"""Small ONNX files for tests, each with what its name says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def save(
    path: Path,
    inputs: Sequence[onnx.ValueInfoProto],
    nodes: Sequence[onnx.NodeProto],
    output: int = FLOAT,
    *,
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 18,
    domains: Sequence[str] = (),
) -> Path:
    """Write the graph of ``nodes``; its output is ``y`` of the type ``output``."""
    result = helper.make_tensor_value_info("y", output, None)
    graph = helper.make_graph(list(nodes), "graph", list(inputs), [result], list(constants))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def value(name: str, kind: int, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def doubling(path: Path) -> Path:
    """y = 2 x for images ``[n, 3, 4, 4]``."""
    two = numpy_helper.from_array(np.float32(2), "two")
    nodes = [helper.make_node("Mul", ["x", "two"], ["y"])]
    return save(path, [value("x", FLOAT, ["n", 3, 4, 4])], nodes, constants=[two])


def endless(path: Path) -> Path:
    """Adds 0 to x until 2**62 rounds are over."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["a", "a"], ["b"])],
        "body",
        [
            value("i", INT64, []),
            value("c", TensorProto.BOOL, []),
            value("a", FLOAT, ["n", 3, 4, 4]),
        ],
        [value("d", TensorProto.BOOL, []), value("b", FLOAT, ["n", 3, 4, 4])],
    )
    constants = [
        numpy_helper.from_array(np.int64(2**62), "rounds"),
        numpy_helper.from_array(np.array(True), "go"),
    ]
    nodes = [helper.make_node("Loop", ["rounds", "go", "x"], ["y"], body=body)]
    return save(path, [value("x", FLOAT, ["n", 3, 4, 4])], nodes, constants=constants)


def hungry(path: Path, count: int) -> Path:
    """Spreads x, one value, to ``count`` values, which is 4 ``count`` bytes of memory."""
    constants = [
        numpy_helper.from_array(np.array([count]), "count"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "count"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["y"], keepdims=0),
    ]
    return save(path, [value("x", FLOAT, ["n", 3, 4, 4])], nodes, constants=constants)
