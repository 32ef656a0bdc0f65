"""ONNX Runtime on the CPU: open sessions, run files, and inspect their optimized graphs.

``run``, ``kernels`` and ``optimized`` work in a process of their own (``isolated``): a crash
of the runtime is an error there. A session lives in the caller's process, as on a device.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from penjing.errors import PenjingError
from penjing.targets.onnxruntime import isolated
from penjing.targets.onnxruntime.isolated import File, Source

if TYPE_CHECKING:
    import onnx

_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\)(?: const)? ?")
"""Pattern of the place in its own source that the runtime puts into errors."""


def session(
    source: Source, threads: int = 1, *, name: str = "", optimized: Path | None = None
) -> ort.InferenceSession:
    """Open a session on the CPU with ``threads`` threads that sleep between two runs.

    Args:
        name: name of ``source`` in errors.
        optimized: file to which the runtime writes its optimized graph.

    Raises:
        PenjingError: ONNX Runtime cannot load ``source``.
    """
    options = _options(threads)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    model = source if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PenjingError(
            f"ONNX Runtime {ort.__version__} cannot load {name or File(source).name}: "
            f"{_one_line(error)}; check that it is an ONNX file that this version supports."
        ) from error


def run(source: Source, batches: Iterable[np.ndarray], threads: int = 1) -> list[list[np.ndarray]]:
    """Return the outputs for every batch (float32 ``[N, C, H, W]``), in the graph's order.

    Raises:
        PenjingError: ONNX Runtime cannot load or run ``source``, or dies of it.
    """
    with isolated.running(File(source), threads) as outputs_of:
        return [outputs_of(batch) for batch in batches]


def kernels(source: Source) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime has optimized for this machine."""
    return Counter(node.op_type for node in optimized(source).graph.node)


def optimized(source: Source) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime runs, after all its fusions.

    Raises:
        PenjingError: ONNX Runtime cannot load ``source``, or dies of it.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        isolated.do("optimize", [File(source)], target=str(path))
        return onnx.load(path)


def arrays(outputs: Sequence[Any], name: str) -> list[np.ndarray]:
    """Check that ``outputs`` of the file ``name`` are tensors of numbers, and return them as arrays.

    Raises:
        PenjingError: an output is text, a sequence or a map.
    """
    for index, output in enumerate(outputs):
        number = isinstance(output, np.ndarray | np.generic)
        if not number or output.dtype.hasobject:
            found = "text" if number else f"a {type(output).__name__}"
            raise PenjingError(
                f"output {index} of {name} is {found}; expected a tensor of numbers: leave out "
                "the nodes that make it."
            )
    return [np.asarray(output) for output in outputs]


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn the runtime's errors while it runs the file ``name`` into a PenjingError."""
    try:
        yield
    except PenjingError:
        raise
    except Exception as error:
        raise PenjingError(
            f"ONNX Runtime {ort.__version__} cannot run {name}: {_one_line(error)}."
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join((str(error) or type(error).__name__).split())
    return _SOURCE.sub("", text).rstrip(".;")


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
