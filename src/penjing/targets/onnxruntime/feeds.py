"""Inputs of files in ONNX Runtime: images to compute outputs, random values to time them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from penjing.errors import PenjingError

Shapes = Mapping[str, Sequence[int]]
"""Shapes of inputs by name; the name of a file's only input may be empty."""

FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
BYTES = {"uint8": np.uint8, "int8": np.int8}
INTEGERS = {
    **{f"int{bits}": np.dtype(f"int{bits}") for bits in (16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"uint{bits}") for bits in (16, 32, 64)},
}
BFLOAT16 = 16
"""ONNX's number of bfloat16, which NumPy lacks; its values are the high halves of float32."""


def parse(text: str) -> dict[str, tuple[int, ...]]:
    """Parse shapes: ``1x3x224x224`` or ``image=1x3x224x224,mask=1x1x224x224``; ``step=`` is a scalar.

    Raises:
        PenjingError: the text has another form.
    """
    shapes = {}
    for part in text.split(","):
        name, _, sizes = part.strip().rpartition("=")
        if not re.fullmatch(r"\d+(x\d+)*", sizes) and (sizes or not name):
            raise PenjingError(
                f"--shape {text} is no shape; expected sizes with x between them, 1x3x224x224, or "
                "image=1x3x224x224,mask=1x1x224x224 for several inputs."
            )
        shapes[name] = tuple(int(size) for size in sizes.split("x") if size)
    return shapes


def feed(opened: ort.InferenceSession, batch: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Convert ``batch`` float32 ``[N, C, H, W]`` to the inputs of ``opened``; errors call it ``name``.

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
    """Make a value of the right type and shape for each input of ``opened``.

    Floats are random in [-2, 2), bytes random, booleans true (no mask hides anything), and other
    integers 0, which is a valid index. bfloat16 comes as its bits, uint16.

    Args:
        shapes: shapes of inputs whose size the file leaves open beyond the first axis, which is 1 by
            default.
        name: name of the file in errors.

    Raises:
        PenjingError: an input is no tensor of numbers; its shape is open, or does not fit that in
            ``shapes``.
    """
    inputs = opened.get_inputs()
    _check_types(inputs, name)
    if "" in shapes and len(inputs) != 1:
        raise PenjingError(
            f"{name} takes {_described(inputs)}; say which input has the shape {_shape(shapes[''])}: "
            "--shape NAME=SHAPE, with commas between several."
        )
    given = {image.name: shapes.get(image.name, shapes.get("")) for image in inputs}
    sizes = _sizes(inputs, given)
    return {
        image.name: _values(image.type, _complete(image, given[image.name], sizes, name))
        for image in inputs
    }


def runner(opened: ort.InferenceSession, values: dict[str, np.ndarray]) -> Callable[[], object]:
    """Return a function that runs ``opened`` once on ``values``, made by ``feeds``."""
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


def _check_types(inputs: Sequence[Any], name: str) -> None:
    for image in inputs:
        if _kind(image.type) not in {*FLOATS, *BYTES, *INTEGERS, "bfloat16", "bool"}:
            raise PenjingError(
                f"input {image.name} of {name} is {image.type}; penjing can feed tensors of floats, "
                "integers and truth values: measure a file that takes those."
            )


def _sizes(inputs: Sequence[Any], given: Mapping[str, Sequence[int] | None]) -> dict[str, int]:
    """Find the sizes of the file's named axes in the shapes given."""
    sizes = {}
    for image in inputs:
        # _complete checks the number of axes.
        pairs = zip(image.shape, given[image.name] or (), strict=False)
        sizes.update({wanted: size for wanted, size in pairs if isinstance(wanted, str)})
    return sizes


def _complete(
    image: Any, given: Sequence[int] | None, sizes: Mapping[str, int], name: str
) -> tuple[int, ...]:
    """Return the shape of one input: ``given``, or the file's, with ``sizes`` for its named axes."""
    if given is not None:
        # If a file has no shape for an input, the runtime has none of any axis.
        if image.shape and not _fits(image.shape, given):
            raise PenjingError(
                f"input {image.name} of {name} has the shape {_shape(image.shape)}, which "
                f"{_shape(given)} does not fit; give another --shape."
            )
        return tuple(given)
    known = [size if _fixed(size) else sizes.get(size, 0) for size in image.shape]
    if known:
        known[0] = known[0] or 1
    if 0 in known:
        example = "x".join(str(size or 224) for size in known)
        raise PenjingError(
            f"{name} leaves the size of its input {image.name} open, {_shape(image.shape)}, on "
            f"which its time depends; give it: --shape {image.name}={example}, for example."
        )
    return tuple(known)


def _fits(wanted: Sequence[int | str | None], given: Sequence[int]) -> bool:
    return len(wanted) == len(given) and all(
        size == want or not _fixed(want) for want, size in zip(wanted, given, strict=True)
    )


def _fixed(size: int | str | None) -> bool:
    """Whether ``size`` is fixed; exporters write an open one as a name, as nothing, as 0 or as -1."""
    return isinstance(size, int) and size > 0


def _values(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = _kind(kind)
    if kind == "bool" or kind in INTEGERS:
        return np.ones(shape, bool) if kind == "bool" else np.zeros(shape, INTEGERS[kind])
    # Importing NumPy's generators would take memory, which is measured with these values.
    dice = np.frombuffer(random.Random(0).randbytes(2**16), np.int8)
    values = np.resize(dice, shape)
    if kind in BYTES:
        return values.view(BYTES[kind])
    values = np.asarray(values.astype(FLOATS.get(kind, np.float32)) / 64)
    return np.asarray(values.view(np.uint32) >> 16, np.uint16) if kind == "bfloat16" else values


def _kind(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else ""


def _described(inputs: Sequence[Any]) -> str:
    shown = (f"{image.name} ({image.type} {_shape(image.shape)})" for image in inputs)
    return ", ".join(shown) or "no input"


def _shape(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
