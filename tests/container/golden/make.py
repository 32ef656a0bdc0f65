"""Write the golden files: for every form of the container a file that must stay readable for ever.

Run from the repository, with ``PYTHONPATH=src:tests/container``. A golden file that exists is never
written again: it is what penjing wrote when its form was new. ``SHA256`` has the digest of the ONNX
file that each one unpacks to, as ``sha256sum`` writes it.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_files import chain, graph, quantized
from walks import walk

from penjing.container import format
from penjing.container.planes import element_type

FOLDER = Path(__file__).parent
UNKNOWN = 27
"""The first number of an element type that the format does not know: plain bytes."""


def inputs() -> Iterator[tuple[str, bytes, str]]:
    """Name, ONNX file and entropy coder of each golden file."""
    rng = np.random.default_rng(0)

    def laplace(scale: float, *shape: int) -> np.ndarray:
        return np.clip(np.rint(rng.laplace(0, scale, shape)), -127, 127).astype(np.int8)

    def pruned(density: float, *shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < density, rng.laplace(0, 1, shape), 0)

    kernels = laplace(4, 8, 8, 3, 3)
    yield "uneven", chain(kernels, laplace(3, 10, 8, 3, 3), laplace(2, 12, 50)), "arithmetic"
    pixels = laplace(3, 60, 8, 3, 1).repeat(3, 3).swapaxes(2, 3).reshape(60, 8, 9)[..., :8]
    yield "uneven-eights", chain(pixels.reshape(60, 64) + laplace(1, 60, 64)), "arithmetic"
    smooth = [correlated(rng, *shape) for shape in ((32, 8, 3, 3), (24, 4, 5, 5))]
    yield "smooth", chain(*smooth), "arithmetic"
    yield "smooth-eights", chain(correlated(rng, 60, 8, 1, 8).reshape(60, 64)), "arithmetic"
    kernels = [walk((8, size, 9), 3, rng).reshape(8, size, 3, 3).astype(np.int8) for size in (8, 9)]
    yield "dependent", chain(*kernels, walk((16, 40, 1), 2, rng).astype(np.int8)), "arithmetic"
    runs = 3.0 * np.repeat(rng.random((120, 8)) < 0.15, 8, 1)
    yield "dependent-eights", chain(walk((120, 64, 1), runs, rng).astype(np.int8)), "arithmetic"
    kernels = [uneven_zeros(rng, 8, size, 3, 3) for size in (40, 20)]
    yield "sparse", chain(*kernels, uneven_zeros(rng, 60, 30, 1, 1)[:, :, 0, 0]), "arithmetic"
    near = np.repeat(rng.random((60, 5)) < 0.2, 8, 1) & (rng.random((60, 40)) < 0.6)
    near = np.where(near, rng.integers(-9, 9, (60, 40)), 0)
    yield "sparse-eights", chain(near.astype(np.int8)), "arithmetic"
    large, long, deep = laplace(5, 4, 3, 9, 9), laplace(5, 12, 8, 1, 7), laplace(5, 24, 1, 5, 5)
    yield "kernels", chain(large, long, deep, laplace(5, 1, 900), np.abs(deep)), "arithmetic"

    rare = np.zeros(2400, np.int8)
    rare[np.cumsum(rng.integers(8, 13, 180))] = rng.integers(1, 9, 180)
    yield "relative", chain(rare), "arithmetic"
    yield "relative-huffman", chain(rare), "huffman"
    yield "relative-far-huffman", chain((9 * pruned(0.02, 60, 60)).astype(np.int8)), "huffman"
    large = np.where(rng.random((60, 40)) < 0.1, rng.integers(-99, 99, (60, 40)), 0)
    yield "masked", chain(large.astype(np.int8)), "arithmetic"
    yield "huffman", quantized(rng, (16, 3, 3, 3), (16, 16, 3, 3), (10, 64)), "huffman"
    yield "quantized", quantized(rng, (16, 3, 3, 3), (16, 16, 3, 3), (10, 64)), "arithmetic"
    floats = rng.normal(0, 0.05, (16, 5, 2, 2))
    wide = [floats.astype(kind) for kind in ("f2", "f4", "f8")]
    yield "floats", chain(*wide, rng.normal(0, 999, (30, 20)).astype(np.int32)), "arithmetic"
    yield "floats-huffman", chain(*wide), "huffman"
    zeros = [pruned(0.2, 30, 40).astype(kind) for kind in ("f4", "f2")]
    yield "zeros", chain(*zeros), "arithmetic"
    shared = rng.integers(0, 9, (30, 40)) / 3 - 1
    yield "codebook", chain(*(shared.astype(kind) for kind in ("f4", "f2", "i2"))), "arithmetic"
    rounded = [(rng.normal(0, 9, 90).round() + 0.0) / 2**power for power in range(6)]
    biases = [one.astype(np.float32) for one in rounded]
    yield "grid", chain(*biases, biases[0].repeat(4) / 3), "arithmetic"
    narrow, wide = ([one.astype(kind) for one in rounded] for kind in ("f2", "f8"))
    yield "grid-huffman", chain(*narrow, *wide), "huffman"

    random = rng.integers(0, 256, 1200).astype(np.uint8)
    yield "stored", chain(random), "arithmetic"
    yield "constant", chain(np.full(900, 7, np.uint8)), "arithmetic"
    yield "lzma", chain(np.tile(random[:300], 9), np.arange(999)), "arithmetic"
    yield "block", chain(random, random), "arithmetic"
    odd = TensorProto(name="odd", data_type=TensorProto.FLOAT, dims=[3], raw_data=bytes(8))
    laid = numpy_helper.from_array(laplace(4, 30, 40), "w")
    yield "lzma-graph", graph([laid, odd]), "arithmetic"
    yield "subgraphs", with_subgraphs(*kernels), "arithmetic"
    yield "empty", graph([]), "arithmetic"
    yield "types", graph([*every_type(rng, 90)]), "arithmetic"
    yield (
        "narrow",
        graph([packed(rng, one) for one in ("INT4", "UINT4", "INT2", "UINT2")]),
        "arithmetic",
    )


def packed(rng: np.random.Generator, kind: str) -> TensorProto:
    """A matrix of integers of 4 or 2 bits in 520 bytes."""
    bits = int(kind[-1])
    rows, columns = shape = 520, 8 // bits
    values = np.rint(rng.laplace(0, 0.8, shape)).astype(int) + (2 if kind[0] == "U" else 0)
    parts = (values & 2**bits - 1).reshape(-1, 8 // bits) << np.arange(0, 8, bits)
    raw = np.bitwise_or.reduce(parts, axis=1).astype(np.uint8).tobytes()
    data_type = getattr(TensorProto, kind)
    return TensorProto(name=kind, data_type=data_type, dims=[rows, columns], raw_data=raw)


def correlated(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """int8 kernels of which each value is near the one three positions before it."""
    values = rng.normal(0, 20, (shape[0] * shape[1], math.prod(shape[2:])))
    for at in range(3, values.shape[1]):
        values[:, at] = 0.95 * values[:, at - 3] + 0.3 * values[:, at]
    return np.clip(np.rint(values), -127, 127).astype(np.int8).reshape(shape)


def uneven_zeros(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """int8 values among zeros: few large ones in half of the rows, many small ones in the others."""
    many = np.arange(shape[0])[:, None, None, None] % 2
    kept = np.where(rng.random(shape) < 0.03 + 0.37 * many, 30 - 28 * many, 0)
    return (kept * rng.choice([-1, 1], shape)).astype(np.int8)


def of_type(rng: np.random.Generator, data_type: int, count: int) -> TensorProto:
    """A tensor of ``count`` elements of a type that NumPy may not have."""
    size = -(-count * element_type(data_type).bits // 8)
    if data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        size *= 2
    raw = (9 * data_type + rng.binomial(6, 0.5, size)).astype(np.uint8).tobytes()
    return TensorProto(name=f"t{data_type}", data_type=data_type, dims=[count], raw_data=raw)


def every_type(rng: np.random.Generator, count: int) -> Iterator[TensorProto]:
    for data_type in range(1, UNKNOWN + 1):
        if data_type != TensorProto.STRING:
            yield of_type(rng, data_type, count)


def with_subgraphs(*weights: np.ndarray) -> bytes:
    """Tensors wherever the skeleton is walked for them, and one in ``float_data``."""
    deep = [numpy_helper.from_array(one, "deep") for one in weights]
    then, other = (helper.make_graph([], "inner", [], [], [one]) for one in deep)
    constant = numpy_helper.from_array(np.arange(6, dtype=np.float32), "constant")
    nodes = [
        helper.make_node("If", ["x"], ["z"], then_branch=then, else_branch=other),
        helper.make_node("Constant", [], ["c"], value=constant),
    ]
    packed = helper.make_tensor("packed", TensorProto.FLOAT, [20], np.sqrt(np.arange(20)))
    model = onnx.load_from_string(graph([packed], nodes))
    call = helper.make_node("Constant", [], ["y"], value=constant)
    model.functions.append(helper.make_function("domain", "f", [], ["y"], [call], []))
    return model.SerializeToString()


def main() -> None:
    """Write what is missing."""
    for name, file, coder in inputs():
        target = FOLDER / f"{name}.penjing"
        if not target.exists():
            target.write_bytes(format.encode(file, coder))
            with (FOLDER / "SHA256").open("a") as digests:
                digests.write(f"{hashlib.sha256(file).hexdigest()}  {name}.onnx\n")


if __name__ == "__main__":
    main()
