"""Read from a file the format of each layer's weights, and the numbers that their kernels run on.

Everything is read from the file and from the graph that ONNX Runtime makes of it, not from the recipe.
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
    """The weights of one layer in the file.

    Attributes:
        format: ``float32``, ``int8``, ``int1`` and so on, or ``shared, 32 values``.
        integer: whether the runtime multiplies the weights as integers.
        convolution: whether the layer is a convolution.
    """

    format: str
    integer: bool
    convolution: bool


def stored_layers(
    path: str | Path, places: Mapping[str, Sequence[int]], optimized: ModelProto
) -> dict[str, StoredLayer]:
    """Read how the layers of the file ``path`` are stored.

    Args:
        places: positions in the file of the nodes that multiply by each layer's weight. Other
            products with constant weights are found too, and named after their weight.
        optimized: the graph that the runtime made of the file.

    Returns:
        Each layer by its name; ``integer`` only if all of its nodes run on integers.
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
    """Write ``23 of 53 convolutions run in float32`` for a net that is stored as integers at least in
    part; None if all of its layers run on integers, or it is stored as floats."""
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
    """Constants that a weight is computed from, and the operators and values between."""

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
        """Largest constant, integers first: a depthwise 1 x 1 has as many scales as codes."""
        floats = (TensorProto.FLOAT, TensorProto.DOUBLE)
        return max(self.constants, key=lambda c: (prod(c.dims), c.data_type not in floats))


def _chain(
    value: str, makers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto]
) -> _Chain | None:
    """Trace ``value`` back to its constants; None if it is not constant."""
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
