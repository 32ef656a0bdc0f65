"""Time and memory to pack and unpack VGG-16 as Deep Compression leaves it, in one process each.

    python benchmarks/vgg16.py

The network is torchvision's, with the random weights of its initialization. Each layer keeps its
largest weights at the density of Han et al. 2016 (arXiv:1510.00149, table 4); they are shared:
2**8 values in convolutions, 2**5 in fully connected layers, zero being one, the others spaced
evenly over the weights left of either sign. The file holds them as penjing deploys shared weights:
a table of float32 and an index of a byte for each weight.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper

import results
from container import entropy

CONVOLUTIONS = (58, 22, 34, 36, 53, 24, 42, 32, 27, 34, 35, 29, 36)
LINEAR = (4, 4, 23)
"""Weights kept in per cent, layer by layer."""
PACK_SECONDS, UNPACK_SECONDS, MOST_BYTES = 120, 60, 4e9

CHILD = """
import json, sys, time
from pathlib import Path
from penjing import container
wall, cpu = time.perf_counter(), time.process_time()
getattr(container, sys.argv[1])(*sys.argv[2:])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
status = Path("/proc/self/status").read_text()  # getrusage would count the parent before exec
peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak}))
"""


def layers() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes (uint8, shaped like the weight) and values (float32) of each layer."""
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None)
    found = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    densities = [(kept, 8) for kept in CONVOLUTIONS] + [(kept, 5) for kept in LINEAR]
    for layer, (kept, bits) in zip(found, densities, strict=True):
        yield shared(layer.weight.detach().numpy(), kept / 100, bits)


def shared(weights: np.ndarray, density: float, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``density`` largest of ``weights`` as codes into ``2**bits`` values, which rise."""
    sizes = np.abs(weights)
    place = round((1 - density) * (sizes.size - 1))
    least, most = np.partition(sizes, place, axis=None)[place], sizes.max()
    zero = 2 ** (bits - 1) - 1
    step = (most - least) / (zero - 1)
    codes = np.rint((sizes - least) / step).astype(np.int16) + 1
    codes = zero + np.where(sizes < least, 0, np.copysign(codes, weights)).astype(np.int16)
    steps = least + step * np.arange(zero + 1, dtype=np.float32)
    values = np.concatenate([-steps[zero - 1 :: -1], [0], steps]).astype(np.float32)
    return codes.astype(np.uint8), values


def onnx_file(codes: list[np.ndarray], values: list[np.ndarray]) -> bytes:
    """A chain of the layers: what is measured is the file, not what it computes."""
    nodes, tensors = [], []
    for at, (indices, table) in enumerate(zip(codes, values, strict=True)):
        bias = np.zeros(len(indices), np.float32)
        arrays = {f"codes{at}": indices, f"values{at}": table, f"bias{at}": bias}
        tensors += map(numpy_helper.from_array, arrays.values(), arrays)
        names = [f"x{at}", f"weight{at}", f"bias{at}"]
        kind, more = ("Conv", {}) if indices.ndim == 4 else ("Gemm", {"transB": 1})
        nodes += [
            helper.make_node("Cast", [f"codes{at}"], [f"wide{at}"], to=TensorProto.INT32),
            helper.make_node("Gather", [f"values{at}", f"wide{at}"], [f"weight{at}"]),
            helper.make_node(kind, names, [f"x{at + 1}"], **more),
        ]
    ends = [helper.make_tensor_value_info(f"x{at}", 1, None) for at in (0, len(codes))]
    graph = helper.make_graph(nodes, "vgg16", ends[:1], ends[1:], tensors)
    return helper.make_model(graph).SerializeToString()


def measured(verb: str, source: Path, target: Path) -> dict[str, float]:
    """Wall and processor seconds and peak bytes of a process that only packs or unpacks."""
    command = [sys.executable, "-c", CHILD, verb, str(source), str(target)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def at_most(measure: str, ours: float, goal: float | None, peer: float | None, name: str) -> dict:
    """A row that is met if ``ours`` is not above the ``goal``."""
    met = None if goal is None else bool(ours <= goal)
    text = None if goal is None else f"at most {goal:g}"
    cells = {"measure": measure, "ours": ours, "peer": peer, "peer_name": name}
    return {"work": "VGG-16, densities of Deep Compression", **cells, "goal": text, "met": met}


def rows(folder: Path) -> list[dict]:
    """All figures of the file."""
    codes, values = zip(*layers(), strict=True)
    order0 = sum(indices.size * entropy(indices) for indices in codes) / 8
    source, packed, back = (folder / name for name in ("m.onnx", "m.penjing", "b.onnx"))
    source.write_bytes(onnx_file(list(codes), list(values)))
    del codes, values
    packing = measured("pack", source, packed)
    unpacking = measured("unpack", packed, back)
    if back.read_bytes() != source.read_bytes():
        raise SystemExit("VGG-16 did not come back bit for bit")
    size = packed.stat().st_size
    return [
        at_most("file, bytes", size, None, order0, "order-0 entropy of the weights"),
        at_most("packing, seconds", packing["wall"], PACK_SECONDS, None, ""),
        at_most("packing, CPU seconds", packing["cpu"], None, None, ""),
        at_most("packing, peak bytes of memory", packing["peak"], MOST_BYTES, None, ""),
        at_most("unpacking, seconds", unpacking["wall"], UNPACK_SECONDS, None, ""),
        at_most("unpacking, CPU seconds", unpacking["cpu"], None, None, ""),
        at_most("unpacking, peak bytes of memory", unpacking["peak"], MOST_BYTES, None, ""),
    ]


def main() -> None:
    """Measure and write results/vgg16.json."""
    with tempfile.TemporaryDirectory() as folder:
        results.write("vgg16", rows(Path(folder)), "python benchmarks/vgg16.py")


if __name__ == "__main__":
    main()
