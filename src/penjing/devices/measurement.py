"""Measure deployed files on a device: score, outputs, agreement, latency, peak memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from penjing import container
from penjing.devices.device import Device
from penjing.devices.local import HERE, Local
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import onnx_files
from penjing.targets.onnxruntime.feeds import Shapes
from penjing.targets.onnxruntime.isolated import File
from penjing.tasks import Task
from penjing.tasks import outputs as tasks_outputs
from penjing.tasks.divergence import columns


@dataclass(frozen=True)
class Agreement:
    """Agreement of a deployed file with the PyTorch model it was made of.

    ``max_error`` is the largest absolute difference of any output value, ``distance`` the root of the
    mean squared difference relative to the spread (standard deviation) of an output's values, the
    largest of all outputs, ``top1`` the share of rows (of the first output's second axis) whose
    largest value is the same class.
    """

    max_error: float
    distance: float
    top1: float


def score(
    path: str | Path,
    task: Task,
    split: str,
    limit: int | None = None,
    *,
    form: Any = None,
    device: Device = HERE,
) -> float:
    """Compute ``task.score`` of the deployed file over ``split``, or over ``limit`` of its images.

    Args:
        form: an output of the model that the file was made of; the task's score is given the
            file's output in its form.
        device: device that the file runs on.
    """
    return float(task.score(*outputs(path, task, split, limit, form=form, device=device)))


def outputs(
    path: str | Path,
    task: Task,
    split: str,
    limit: int | None = None,
    *,
    form: Any = None,
    device: Device = HERE,
) -> tuple[Any, Tensor]:
    """Return the outputs of the deployed file for ``split``, and the targets ``[N, ...]``.

    Args:
        form: as in ``score``; without it a tensor, or a tuple if the file has several outputs.
        device: device that the file runs on.
    """
    found, targets = [], []
    with device.running(path) as outputs_of:
        for images, target in task.batches(split, limit=limit):  # type: ignore[arg-type]
            values = _tensors(outputs_of(images.numpy()))
            if form is not None:
                found.append(tasks_outputs.like(form, values))
            else:
                found.append(values[0] if len(values) == 1 else tuple(values))
            targets.append(target)
    return tasks_outputs.concatenated(found), torch.cat(targets)


def agreement(
    model: nn.Module,
    path: str | Path,
    batches: Iterable[Tensor],
    device: Device = HERE,
) -> Agreement:
    """Compare ``path`` with ``model`` (run in eval mode) on ``batches`` (float32 ``[N, C, H, W]``).

    Raises:
        PenjingError: an output of the model or of the file is NaN, or only one of them is infinite.
    """
    expected, found = [], []
    with device.running(path) as outputs_of:
        for batch in batches:
            expected.append(_expected(model, batch))
            found.append(_tensors(outputs_of(batch.numpy())))
    pairs = [
        (tasks_outputs.concatenated(list(e)), tasks_outputs.concatenated(list(f)))
        for e, f in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True)
    ]
    for index, pair in enumerate(pairs):
        _check_finite(index, path, *pair)
    first = pairs[0]
    return Agreement(
        max(_difference(*pair) for pair in pairs),
        max(_distance(*pair) for pair in pairs),
        float((_best(first[0]) == _best(first[1])).double().mean()),
    )


def distance(expected: nn.Module, found: nn.Module, batches: Iterable[Tensor]) -> float:
    """Return the ``distance`` of ``Agreement`` between the outputs of two models on ``batches``
    (float32 ``[N, ...]``)."""
    pairs = [(_expected(expected, batch), _expected(found, batch)) for batch in batches]
    columns_of = [zip(*side, strict=True) for side in zip(*pairs, strict=True)]
    joined = [[tasks_outputs.concatenated(list(c)) for c in side] for side in columns_of]
    return max(_distance(*pair) for pair in zip(*joined, strict=True))


def _check_finite(index: int, path: str | Path, expected: Tensor, found: Tensor) -> None:
    for tensor, whose in ((expected, "the model"), (found, f"{path}")):
        if tensor.isnan().any():
            raise PenjingError(
                f"output {index} of {whose} is NaN on training images; check the model's weights "
                "(negative variances of norms, overflows) and the preprocessing."
            )
    if not torch.equal(expected.isinf(), found.isinf()):
        raise PenjingError(
            f"output {index} of {path} is infinite where the model's is not, or the other way round; "
            "check the model for values that overflow."
        )


def _distance(expected: Tensor, found: Tensor) -> float:
    finite = expected.isfinite()
    expected, found = expected[finite].double(), found[finite].double()
    if not len(expected):
        return 0.0
    spread = float(expected.std(correction=0)) or float(expected.abs().max()) or 1.0
    return float((expected - found).square().mean().sqrt()) / spread


def bench(
    paths: Sequence[str | Path],
    *,
    runs: int = 200,
    threads: int = 1,
    shapes: Shapes | None = None,
) -> list[dict[str, Any]]:
    """Measure bytes, latency and peak memory of every ``.onnx`` or ``.penjing`` file, timed in turns.

    Args:
        runs: exact number of runs of each file.
        threads: number of threads of the runtime, for both latency and memory.
        shapes: shapes of inputs by name, if a file leaves more open than the number of images (which
            is 1 then); the name may be empty for the only input.

    Returns:
        One row a file: its ``bytes`` with those of ``data_files`` beside it that hold weights, its
        measurements, and the ``shapes`` of its inputs.

    Raises:
        PenjingError: a file cannot be read or run, a shape is missing or does not fit.
    """
    for option, value in (("runs", runs), ("threads", threads)):
        if value < 1:
            raise PenjingError(f"{option} must be at least 1, found {value}.")
    with tempfile.TemporaryDirectory() as folder:
        found = [_found(Path(p), Path(folder, f"{i}.onnx")) for i, p in enumerate(paths)]
        files = _shaped(found, shapes or {})
        timing = {"runs": runs, "seconds": math.inf, "settled": 0}
        device = Local(threads)
        timed, fed = device.timed(files, timing)
        return [
            {
                "file": file.name,
                "data_files": [str(path) for path in data],
                "bytes": sum(path.stat().st_size for path in [Path(file.name), *data]),
                "latency_ms": row.median_ms,
                "latency_p10_ms": row.p10_ms,
                "latency_p90_ms": row.p90_ms,
                "peak_rss_bytes": device.peak(file),
                "runs": row.runs,
                "threads": threads,
                "shapes": shape,
            }
            for (_, _, data), file, row, shape in zip(found, files, timed, fed, strict=True)
        ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Make a table for a terminal of the rows of ``bench``."""
    threads = rows[0]["threads"]
    shown = Table("file", "KB", "input", "median ms", "p10 ms", "p90 ms", "peak MB")
    shown.caption = f"{threads} thread{'s' if threads > 1 else ''}"
    for row in rows:
        times = (row[key] for key in ("latency_ms", "latency_p10_ms", "latency_p90_ms"))
        fed = ("x".join(map(str, shape)) or "scalar" for shape in row["shapes"].values())
        shown.add_row(
            escape("\n".join([row["file"], *(f"+ {path}" for path in row["data_files"])])),
            f"{row['bytes'] / 1000:.1f}",
            "\n".join(fed) or "none",
            *(f"{ms:.3f}" for ms in times),
            f"{row['peak_rss_bytes'] / 1e6:.1f}",
        )
    return shown


def _found(path: Path, unpacked: Path) -> tuple[File, ModelProto, list[Path]]:
    """Return the file to run for ``path``, its graph, and the files beside it that hold weights."""
    if path.suffix == ".penjing":
        container.unpack(path, unpacked)
        return File(unpacked, str(path)), onnx_files.read(unpacked, path), []
    model = onnx_files.read(path, path)
    return File(path), model, onnx_files.data_files(model, path)


def _shaped(found: Sequence[tuple[File, ModelProto, list[Path]]], shapes: Shapes) -> list[File]:
    """Give each file those of ``shapes`` that belong to its inputs."""
    inputs = [onnx_files.inputs(model) for _, model, _ in found]
    known = {name for names in inputs for name in names}
    for name in shapes.keys() - known - {""}:
        raise PenjingError(
            f"--shape names the input {name}, which none of the files has; their inputs are "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    files = []
    for (file, _, _), names in zip(found, inputs, strict=True):
        given = {name: tuple(shapes[name]) for name in shapes if name in names or not name}
        files.append(replace(file, shapes=given))
        _check_axes(files[-1], names)
    return files


def _check_axes(file: File, inputs: dict[str, bool]) -> None:
    """Raise PenjingError if an input has no shape: the runtime would silently take it for a scalar."""
    for name, has_shape in inputs.items():
        if not has_shape and not {name, ""} & file.shapes.keys():
            raise PenjingError(
                f"{file.name} has no shape for its input {name}; give it: --shape "
                f"{name}=1x3x224x224, for example."
            )


def _expected(model: nn.Module, batch: Tensor) -> list[Tensor]:
    device = next((p.device for p in model.parameters()), batch.device)
    with tasks_outputs.evaluating(model):
        output = model(batch.to(device))
    return [tensor.cpu() for tensor in tasks_outputs.tensors(output)]


def _tensors(values: Sequence[np.ndarray]) -> list[Tensor]:
    # A runtime returns tensors without axes as NumPy's scalars.
    return [torch.from_numpy(np.asarray(value)) for value in values]


def _best(scores: Tensor) -> Tensor:
    """Return the class with the largest score; of one logit, whether it is above 0."""
    return columns(scores).argmax(dim=1)


def _difference(expected: Tensor, found: Tensor) -> float:
    finite = expected.isfinite()
    difference = (expected[finite].double() - found[finite].double()).abs()
    return float(difference.max()) if len(difference) else 0.0
