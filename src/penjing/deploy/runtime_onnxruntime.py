"""ONNX Runtime on the CPU: how a session is opened, run and looked into."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from penjing.errors import PenjingError

Source = str | Path | bytes
"""A ``.onnx`` file, or its bytes."""


def session(source: Source, threads: int = 1) -> ort.InferenceSession:
    """A session on the CPU with ``threads`` threads that sleep between two runs.

    Raises ``PenjingError`` when ONNX Runtime cannot load ``source``.
    """
    return _open(source, _options(threads))


def run(source: Source, batches: Iterable[np.ndarray], threads: int = 1) -> list[list[np.ndarray]]:
    """The outputs of every batch (float32 ``[N, C, H, W]``), in the order of the graph's outputs."""
    opened = session(source, threads)
    return [opened.run(None, feed(opened, batch)) for batch in batches]


def feed(opened: ort.InferenceSession, batch: np.ndarray) -> dict[str, np.ndarray]:
    """``batch`` float32 ``[N, C, H, W]`` as ``opened`` takes it.

    A file that takes uint8 takes pixels ``[N, H, W, C]``; the batch is then in [0, 1].
    """
    image = opened.get_inputs()[0]
    if image.type == "tensor(uint8)":
        batch = np.rint(np.asarray(batch) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return {image.name: np.ascontiguousarray(batch)}
    return {image.name: np.asarray(batch, np.float32)}


def any_image(opened: ort.InferenceSession) -> dict[str, np.ndarray]:
    """One image of random values, of the shape and type that ``opened`` takes."""
    image = opened.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in image.shape]
    random = np.random.default_rng(0)
    if image.type == "tensor(uint8)":
        return {image.name: random.integers(256, size=shape, dtype=np.uint8)}
    return {image.name: random.standard_normal(shape).astype(np.float32)}


def kernels(source: Source) -> Counter[str]:
    """How often each operator occurs in the graph as ONNX Runtime optimized it for this machine."""
    return Counter(node.op_type for node in optimized(source).graph.node)


def optimized(source: Source) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs, after all its fusions."""
    with tempfile.TemporaryDirectory() as folder:
        options = _options(threads=1)
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        _open(source, options)
        return onnx.load(options.optimized_model_filepath)


def _open(source: Source, options: ort.SessionOptions) -> ort.InferenceSession:
    model = source if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        shown = "the exported graph" if isinstance(source, bytes) else source
        raise PenjingError(
            f"ONNX Runtime {ort.__version__} cannot load {shown}: {error}; check that it is an ONNX "
            "file that this version supports."
        ) from error


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
