"""The only place where numbers are made: on the deployed file, in the runtime that will run it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from penjing import container
from penjing.deploy import runtime_process
from penjing.deploy.runtime_process import File, running
from penjing.deploy.timing import SETTLED, Latency
from penjing.tasks import Task
from penjing.tasks import outputs as tasks_outputs
from penjing.tasks.divergence import columns


@dataclass(frozen=True)
class Agreement:
    """How far a deployed file is from the PyTorch model it was made of.

    ``max_error`` is the largest absolute difference of any output value, ``top1`` the share of rows
    (of the first output's second axis) whose largest value is the same class.
    """

    max_error: float
    top1: float


def latency(
    paths: Sequence[str | Path],
    *,
    runs: int = 300,
    warmup: int = 10,
    threads: int = 1,
    seconds: float = 10.0,
    settled: float = SETTLED,
) -> list[Latency]:
    """Time every file of ``paths``, one image at a time.

    The files take turns run by run, in an order that changes each time, so that a change in the
    machine's load or clock, and what another file leaves in the caches, meets all of them alike.
    There are ``runs`` runs of each at most: they end when the medians of all files are known to 1 %
    (``settled``; not before the twentieth run), or when ``seconds`` are over.
    """
    files = [File(path) for path in paths]
    timing = {"runs": runs, "warmup": warmup, "seconds": seconds, "settled": settled}
    return _timed(files, threads, timing)[0]


def peak_rss(path: str | Path) -> int:
    """Peak resident memory, in bytes, of a process that does nothing but run ``path``."""
    return _peak(File(path), threads=1)


def score(
    path: str | Path, task: Task, split: str, limit: int | None = None, *, form: Any = None
) -> float:
    """``task.score`` of the deployed file over ``split``, or over its first ``limit`` images.

    Args:
        form: an output of the model that the file was made of; the task's score is given the
            file's output in its form.
    """
    return float(task.score(*outputs(path, task, split, limit, form=form)))


def outputs(
    path: str | Path, task: Task, split: str, limit: int | None = None, *, form: Any = None
) -> tuple[Any, Tensor]:
    """What the deployed file gives over ``split``, and the targets ``[N, ...]``.

    Args:
        form: as in ``score``; without it a tensor, or a tuple where the file has several outputs.
    """
    found, targets = [], []
    with running(File(path)) as outputs_of:
        for images, target in task.batches(split, limit=limit):  # type: ignore[arg-type]
            values = _tensors(outputs_of(images.numpy()))
            if form is not None:
                found.append(tasks_outputs.like(form, values))
            else:
                found.append(values[0] if len(values) == 1 else tuple(values))
            targets.append(target)
    return tasks_outputs.concatenated(found), torch.cat(targets)


def agreement(model: nn.Module, path: str | Path, batches: Iterable[Tensor]) -> Agreement:
    """Compare ``path`` with ``model`` (run in eval mode) on ``batches`` (float32 ``[N, C, H, W]``)."""
    worst, same = 0.0, []
    with running(File(path)) as outputs_of:
        for batch in batches:
            expected = _expected(model, batch)
            found = _tensors(outputs_of(batch.numpy()))
            worst = max([worst, *(_difference(e, f) for e, f in zip(expected, found, strict=True))])
            same.append((_best(expected[0]) == _best(found[0])).flatten())
    return Agreement(worst, float(torch.cat(same).double().mean()))


def bench(
    paths: Sequence[str | Path], *, runs: int = 200, threads: int = 1
) -> list[dict[str, str | int | float]]:
    """Bytes, latency and peak memory of every ``.onnx`` or ``.penjing`` file, timed in turns.

    Raises ``PenjingError`` for a file that cannot be read or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [_unpacked(Path(path), Path(folder, f"{i}.onnx")) for i, path in enumerate(paths)]
        timed = latency(files, runs=runs, threads=threads, seconds=math.inf, settled=0)
        return [
            {
                "file": str(path),
                "bytes": Path(path).stat().st_size,
                "latency_ms": row.median_ms,
                "latency_p10_ms": row.p10_ms,
                "latency_p90_ms": row.p90_ms,
                "peak_rss_bytes": peak_rss(file),
                "runs": row.runs,
                "threads": threads,
            }
            for path, file, row in zip(paths, files, timed, strict=True)
        ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of ``bench`` for a terminal."""
    shown = Table("file", "KB", "median ms", "p10 ms", "p90 ms", "peak MB")
    for row in rows:
        times = (row[key] for key in ("latency_ms", "latency_p10_ms", "latency_p90_ms"))
        shown.add_row(
            row["file"],
            f"{row['bytes'] / 1000:.1f}",
            *(f"{ms:.3f}" for ms in times),
            f"{row['peak_rss_bytes'] / 1e6:.1f}",
        )
    return shown


def _unpacked(path: Path, target: Path) -> Path:
    if path.suffix != ".penjing":
        return path
    container.unpack(path, target)
    return target


def _expected(model: nn.Module, batch: Tensor) -> list[Tensor]:
    training = model.training
    device = next((p.device for p in model.parameters()), batch.device)
    with torch.no_grad():
        output = model.eval()(batch.to(device))
    model.train(training)
    return [tensor.cpu() for tensor in tasks_outputs.tensors(output)]


def _tensors(values: Sequence[np.ndarray]) -> list[Tensor]:
    # A runtime gives numbers of no axis as NumPy's scalars.
    return [torch.from_numpy(np.asarray(value)) for value in values]


def _best(scores: Tensor) -> Tensor:
    """The class with the largest score; of one logit, whether it is above 0."""
    return columns(scores).argmax(dim=1)


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((expected.double() - found.double()).abs().max())


def _timed(
    files: Sequence[File], threads: int, timing: dict[str, Any]
) -> tuple[list[Latency], list[dict[str, list[int]]]]:
    """Latencies of ``files``, and the shapes of what they were fed, by name."""
    answer, _ = runtime_process.do("time", files, threads=threads, timing=timing)
    return [Latency(**row) for row in answer["timed"]], answer["shapes"]


def _peak(file: File, threads: int) -> int:
    answer, _ = runtime_process.do("peak", [file], threads=threads, fresh=True)
    return int(answer["peak"])
