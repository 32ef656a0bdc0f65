"""Read and add constants of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def add(
    graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None
) -> ir.Value:
    """Add ``array`` to ``graph`` under ``name`` (made unique), stored as ``dtype`` if given."""
    while name in graph.initializers:
        name += "_"
    if dtype is not None:
        array = array.astype(dtype.numpy())
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array behind ``value``, or None if it is not a constant."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()
