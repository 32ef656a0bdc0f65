"""How a file stores the weights of each layer, and on what numbers their kernels run.

Nothing here knows what was asked for: it is read from the file, and from the graph that ONNX Runtime
makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INTEGER_KERNELS = (
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
    "QLinearConv", "QLinearMatMul",
)  # fmt: skip
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class StoredLayer:
    """How the weights of one layer lie in the file.

    Attributes:
        format: ``float32``, ``int8``, ``int1`` and so on, or ``shared, 32 values``.
        integer: whether the runtime multiplies them as integers.
        convolution: whether they are those of a convolution.
    """

    format: str
    integer: bool
    convolution: bool


def stored_layers(
    path: str | Path, places: Mapping[str, Sequence[int]], optimized: ModelProto
) -> dict[str, StoredLayer]:
    """Read how the layers of the file ``path`` are stored.

    Args:
        places: for each layer the positions, in the file, of the nodes that multiply by its weight.
            Other products with constant weights are found too, and called what their weight is.
        optimized: the graph that the runtime made of the file.

    Returns:
        Each layer by its name; one with several nodes is as its least integer one.
    """
    graph = onnx.load(path).graph
    nodes, makers = list(graph.node), {o: n for n in graph.node for o in n.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    integers = _read_as_integers(optimized)
    named = {index: name for name, indices in places.items() for index in indices}
    found: dict[str, StoredLayer] = {}
    for index, node in enumerate(nodes):
        if node.op_type not in PRODUCTS:
            continue
        chain = _chain(node.input[1], makers, constants)
        if chain is None:
            continue
        name = named.get(index) or _called(chain)
        runs = not integers.isdisjoint(chain.values)
        layer = StoredLayer(chain.format, runs, node.op_type in CONVOLUTIONS)
        if name not in found or not runs:
            found[name] = layer
    return found


def floats_sentence(layers: Iterable[StoredLayer]) -> str | None:
    """``23 of 53 convolutions run in float32``, in a net that is stored as integers, at least in part;
    None where there is nothing to say."""
    known = list(layers)
    if all(layer.format.startswith("float") for layer in known):
        return None
    parts = []
    for what, group in (
        ("convolutions", [layer for layer in known if layer.convolution]),
        ("matrix products", [layer for layer in known if not layer.convolution]),
    ):
        floats = sum(not layer.integer for layer in group)
        if floats:
            parts.append(f"{floats} of {len(group)} {what}")
    return f"{' and '.join(parts)} run in float32" if parts else None


@dataclass(frozen=True)
class _Chain:
    """The constants that a weight is made of, and the names of all values on the way."""

    constants: list[TensorProto]
    operators: set[str]
    values: set[str]

    @property
    def format(self) -> str:
        if "Gather" in self.operators:
            codebook = next(c for c in self.constants if c.data_type == TensorProto.FLOAT)
            return f"shared, {prod(codebook.dims)} values"
        if "BitShift" in self.operators:
            return "int1"
        name = TensorProto.DataType.Name(self.weight.data_type).lower()
        return "float32" if name == "float" else name

    @property
    def weight(self) -> TensorProto:
        """The largest constant; of a depthwise 1 x 1, the scale has as many values as the codes."""
        floats = (TensorProto.FLOAT, TensorProto.DOUBLE)
        return max(self.constants, key=lambda c: (prod(c.dims), c.data_type not in floats))


def _chain(
    value: str, makers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto]
) -> _Chain | None:
    """What ``value`` is made of; None where that is not constant."""
    chain, waiting = _Chain([], set(), set()), [value]
    while waiting:
        name = waiting.pop()
        if not name or name in chain.values:
            continue
        chain.values.add(name)
        if name in constants:
            chain.constants.append(constants[name])
        elif name in makers and makers[name].input:
            chain.operators.add(makers[name].op_type)
            waiting += makers[name].input
        else:
            return None
    return chain


def _called(chain: _Chain) -> str:
    return chain.weight.name.removesuffix(".weight")


def _read_as_integers(optimized: ModelProto) -> set[str]:
    nodes = [node for node in optimized.graph.node if node.op_type in INTEGER_KERNELS]
    return {name for node in nodes for name in node.input}
