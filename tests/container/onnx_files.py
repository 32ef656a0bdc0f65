"""ONNX files to pack, built with the onnx package."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def chain(*weights: np.ndarray) -> bytes:
    """A graph that multiplies its input by each of ``weights`` in turn, named w0, w1, ..."""
    return graph([numpy_helper.from_array(w, f"w{index}") for index, w in enumerate(weights)])


def graph(tensors: list[TensorProto], nodes=()) -> bytes:
    """A graph with these initializers, and ``nodes`` before the multiplications by them."""
    nodes = list(nodes)
    names = ["x", *(f"y{index}" for index in range(len(tensors)))]
    for index, tensor in enumerate(tensors):
        node = helper.make_node("Mul", [names[index], tensor.name], [names[index + 1]])
        nodes.append(node)
    ends = [helper.make_tensor_value_info(name, 1, None) for name in (names[0], names[-1])]
    model = helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors))
    return model.SerializeToString()


def quantized(rng: np.random.Generator, *shapes: tuple[int, ...], bits: int = 8) -> bytes:
    """Laplace weights as int8 with a scale, zero point and bias for each output channel."""
    tensors = []
    for index, shape in enumerate(shapes):
        weights = rng.laplace(0, 2.0 ** (bits - 4), shape)
        rows = shape[0]
        arrays = {
            "weight": np.clip(np.rint(weights), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
            "scale": rng.lognormal(-5, 0.5, rows).astype(np.float32),
            "bias": rng.integers(-9999, 9999, rows).astype(np.int32),
            "zero": np.zeros(rows, np.int8),
        }
        arrays["weight"] = arrays["weight"].astype(np.int8)
        tensors += [numpy_helper.from_array(a, f"layer{index}.{n}") for n, a in arrays.items()]
    return graph(tensors)
