"""ONNX Runtime on the CPU: how a session is opened and fed, and how files are run and looked into.

``run``, ``kernels`` and ``optimized`` work in a process of their own (``runtime_process``): a crash
of the runtime is an error there. A session lives in the caller's process, as on a device.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from penjing.deploy import runtime_process
from penjing.deploy.runtime_process import File, Source
from penjing.errors import PenjingError

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, Sequence[int]]
"""Shapes of inputs by name; the name of a file's only input may be empty."""

FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
BYTES = {"uint8": np.uint8, "int8": np.int8}
INTEGERS = {
    **{f"int{bits}": np.dtype(f"int{bits}") for bits in (16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"uint{bits}") for bits in (16, 32, 64)},
}
BFLOAT16 = 16
"""ONNX's number of the type that NumPy has not; its values are the high halves of float32."""


def session(
    source: Source, threads: int = 1, *, name: str = "", optimized: Path | None = None
) -> ort.InferenceSession:
    """A session on the CPU with ``threads`` threads that sleep between two runs.

    Args:
        name: of ``source`` in errors.
        optimized: where the graph is written as the runtime has optimized it.

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
    """The outputs of every batch (float32 ``[N, C, H, W]``), in the order of the graph's outputs.

    Raises:
        PenjingError: ONNX Runtime cannot load or run ``source``, or dies of it.
    """
    with runtime_process.running(File(source), threads) as outputs_of:
        return [outputs_of(batch) for batch in batches]


def kernels(source: Source) -> Counter[str]:
    """How often each operator occurs in the graph as ONNX Runtime optimized it for this machine."""
    return Counter(node.op_type for node in optimized(source).graph.node)


def optimized(source: Source) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs, after all its fusions.

    Raises:
        PenjingError: ONNX Runtime cannot load ``source``, or dies of it.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        runtime_process.do("optimize", [File(source)], target=str(path))
        return onnx.load(path)


def feed(opened: ort.InferenceSession, batch: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """``batch`` float32 ``[N, C, H, W]`` as ``opened`` takes it; ``name`` is of its file.

    A file that takes uint8 takes pixels ``[N, H, W, C]``; the batch is then in [0, 1].

    Raises:
        PenjingError: the file takes anything else than one tensor of floats or pixels.
    """
    inputs = opened.get_inputs()
    kind = _kind(inputs[0].type) if len(inputs) == 1 else ""
    if kind == "uint8":
        batch = np.rint(np.asarray(batch) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return {inputs[0].name: np.ascontiguousarray(batch)}
    if kind not in FLOATS:
        raise PenjingError(
            f"{name} takes {_described(inputs)}; expected one tensor, the images, of floats or uint8 "
            "pixels."
        )
    return {inputs[0].name: np.asarray(batch, FLOATS[kind])}


def feeds(opened: ort.InferenceSession, shapes: Shapes, name: str) -> dict[str, np.ndarray]:
    """A value of the right type and shape for each input of ``opened``, whatever they are.

    Floats are normal, bytes uniform, truth values true (no mask hides anything), and other integers
    0, which is a valid index. bfloat16 comes as its bits, uint16.

    Args:
        shapes: of inputs whose height or width, say, the file leaves open. A first axis that is
            open alone needs none: it is 1.
        name: of the file, for errors.

    Raises:
        PenjingError: an input is no tensor of numbers; its shape is open, or does not fit that in
            ``shapes``.
    """
    random = np.random.default_rng(0)
    inputs = opened.get_inputs()
    if "" in shapes and len(inputs) != 1:
        raise PenjingError(
            f"{name} takes {_described(inputs)}; say which input has the shape {_shape(shapes[''])}: "
            "--shape NAME=SHAPE, with commas between several."
        )
    given = [shapes.get(image.name, shapes.get("")) for image in inputs]
    sizes = _open_sizes(inputs, given)
    return {
        image.name: _values(image, _size(image, shape, sizes, name), random, name)
        for image, shape in zip(inputs, given, strict=True)
    }


def runner(opened: ort.InferenceSession, values: dict[str, np.ndarray]) -> Callable[[], object]:
    """A function that runs ``opened`` once on ``values``, made by ``feeds``."""
    ends = [*opened.get_inputs(), *opened.get_outputs()]
    if not any(end.type == "tensor(bfloat16)" for end in ends):
        return lambda: opened.run(None, values)
    bits = {image.name for image in opened.get_inputs() if image.type == "tensor(bfloat16)"}
    held = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, BFLOAT16)
        if name in bits
        else ort.OrtValue.ortvalue_from_numpy(value)
        for name, value in values.items()
    }
    return lambda: opened.run_with_ort_values(None, held)


def arrays(outputs: Sequence[Any], name: str) -> list[np.ndarray]:
    """``outputs`` of the file ``name``, all of them tensors of numbers.

    Raises:
        PenjingError: one is text, a sequence or a map.
    """
    for index, output in enumerate(outputs):
        if not isinstance(output, np.ndarray) or output.dtype.hasobject:
            found = "text" if isinstance(output, np.ndarray) else type(output).__name__
            raise PenjingError(
                f"output {index} of {name} is {found}; expected a tensor of numbers: take the "
                "nodes that make it out of the graph."
            )
    return list(outputs)


@contextlib.contextmanager
def errors_name(name: str) -> Iterator[None]:
    """Turn what the runtime raises while it runs the file ``name`` into a PenjingError."""
    try:
        yield
    except PenjingError:
        raise
    except Exception as error:
        raise PenjingError(
            f"ONNX Runtime {ort.__version__} cannot run {name}: {_one_line(error)}."
        ) from error


def _open_sizes(inputs: Sequence[Any], given: Sequence[Sequence[int] | None]) -> dict[str, int]:
    """What the shapes given say about sizes that the file names."""
    sizes = {}
    for image, shape in zip(inputs, given, strict=True):
        if shape is not None and len(shape) == len(image.shape):
            pairs = zip(image.shape, shape, strict=True)
            sizes.update({wanted: size for wanted, size in pairs if isinstance(wanted, str)})
    return sizes


def _size(
    image: Any, given: Sequence[int] | None, sizes: dict[str, int], name: str
) -> tuple[int, ...]:
    """The shape of one input: the file's own where it has one, with what is open from elsewhere."""
    if given is not None:
        # A file that says nothing of a shape looks like one with a scalar.
        fits = len(given) == len(image.shape) and all(
            wanted == size or not isinstance(wanted, int)
            for wanted, size in zip(image.shape, given, strict=True)
        )
        if not fits and image.shape:
            raise PenjingError(
                f"input {image.name} of {name} has the shape {_shape(image.shape)}, which "
                f"{_shape(given)} does not fit; give another --shape."
            )
        return tuple(given)
    known = [sizes.get(size, size) if isinstance(size, str) else size for size in image.shape]
    if known and not isinstance(known[0], int):
        known[0] = 1
    if not all(isinstance(size, int) for size in known):
        example = "x".join(str(s) if isinstance(s, int) else "224" for s in known)
        raise PenjingError(
            f"{name} leaves the size of its input {image.name} open, {_shape(image.shape)}, and "
            f"takes longer for a larger one; say it: --shape {image.name}={example}, for example."
        )
    return tuple(int(size) for size in known)


def _values(
    image: Any, shape: tuple[int, ...], random: np.random.Generator, name: str
) -> np.ndarray:
    kind = _kind(image.type)
    if kind in FLOATS:
        return random.standard_normal(shape).astype(FLOATS[kind])
    if kind == "bfloat16":
        bits = random.standard_normal(shape).astype(np.float32)
        return (np.asarray(bits).view(np.uint32) >> 16).astype(np.uint16)
    if kind in BYTES:
        limits = np.iinfo(BYTES[kind])
        return random.integers(limits.min, limits.max + 1, shape, BYTES[kind])
    if kind in INTEGERS:
        return np.zeros(shape, INTEGERS[kind])
    if kind == "bool":
        return np.ones(shape, bool)
    raise PenjingError(
        f"input {image.name} of {name} is {image.type}; penjing can feed tensors of floats, integers "
        "and truth values: measure a file that takes those."
    )


def _kind(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else ""


def _described(inputs: Sequence[Any]) -> str:
    shown = (f"{image.name} ({image.type} {_shape(image.shape)})" for image in inputs)
    return ", ".join(shown) or "no input"


def _shape(shape: Sequence[int | str | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split()).rstrip(".;")


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
