"""Bundles: a whole pipeline as one file, with detector, crops, model and a card of latencies.

The file is a ZIP archive without compression of ``pipeline.json``, ``card.json``,
``detector.penjing`` and, if there is a model behind, ``model.onnx`` or ``model.penjing``.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penjing import container
from penjing.attention.crop import Crop
from penjing.attention.detector import Detector
from penjing.attention.motion import Gate, Motion
from penjing.attention.pipeline import LARGEST_MODEL, File, Module, Pipeline
from penjing.errors import PenjingError, invalid
from penjing.files import atomic
from penjing.targets.timing import time_calls

PLAN, CARD, DETECTOR = "pipeline.json", "card.json", "detector.penjing"
LARGEST = {
    PLAN: 10**5,
    CARD: 10**6,
    DETECTOR: 10**7,
    "model.onnx": LARGEST_MODEL,
    "model.penjing": LARGEST_MODEL,
}
"""Largest size of each possible member, bytes; larger ones are rejected."""
DAMAGE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError)
"""Errors that the standard library raises for archives that it cannot read."""
NEVER = 10**9
"""Number of frames that no measurement reaches."""


class Plan(BaseModel):
    """Contents of ``pipeline.json``."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    threshold: float = Field(ge=0, allow_inf_nan=False)
    every: int = Field(ge=1)
    motion: Motion | None
    crops: list[Crop]
    model: Literal["model.onnx", "model.penjing"] | None


def save(
    pipeline: Pipeline, path: str | Path, frames: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Write ``pipeline`` to ``path`` and return its card.

    A PyTorch model is exported to ONNX; ``postprocess`` and ``enough`` are code and not in the file:
    give them to ``load``.

    Args:
        frames: frames of the camera, uint8 RGB ``[H, W, 3]``, some with an object, on which the
            latencies in the card are measured.

    Raises:
        PenjingError: the model is a Python function, or a module whose crops differ in width; no
            frames.
    """
    if not isinstance(pipeline.detector, Detector):
        raise PenjingError("Only a pipeline whose detector is a file (Detector.load) can be saved.")
    with tempfile.TemporaryDirectory() as folder:
        model = _model_file(pipeline, Path(folder))
        plan = Plan(
            threshold=pipeline.detector.threshold,
            every=pipeline.every,
            motion=pipeline.motion,
            crops=pipeline.crops,
            model="model" + model.suffix if model else None,  # type: ignore[arg-type]
        )
        (onnx := Path(folder, "detector.onnx")).write_bytes(pipeline.detector.source)
        container.pack(onnx, packed := Path(folder, DETECTOR))
        card = _card(pipeline, packed, model, frames)
        with atomic(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(PLAN, plan.model_dump_json(indent=1))
            archive.writestr(CARD, json.dumps(card, indent=1))
            archive.write(packed, DETECTOR)
            if model:
                archive.write(model, plan.model)
    return card


def load(
    path: str | Path,
    *,
    postprocess: Callable[[Any], Any] | None = None,
    enough: Callable[[Any], bool] | None = None,
    threads: int = 1,
) -> Pipeline:
    """Load the pipeline in a bundle. No code in it is executed or unpickled.

    Args:
        postprocess, enough, threads: as in ``Pipeline``.

    Raises:
        PenjingError: the file cannot be read or is no bundle.
    """
    members = _members(Path(path))
    plan = _plan(Path(path), members)
    with tempfile.TemporaryDirectory() as folder:
        detector = Path(folder, DETECTOR)
        detector.write_bytes(members[DETECTOR])
        model = Path(folder, plan.model) if plan.model else None
        if model:
            model.write_bytes(members[model.name])
        try:
            return Pipeline(
                Detector.load(detector, threads=threads, threshold=plan.threshold),
                plan.crops,
                model,
                every=plan.every,
                motion=plan.motion,
                postprocess=postprocess,
                enough=enough,
                threads=threads,
            )
        except PenjingError as error:
            reason = str(error).replace(f"{folder}{os.sep}", "")
            raise PenjingError(f"{path} is a damaged bundle: {reason}") from error


def card(path: str | Path) -> dict[str, Any]:
    """Read the card of a bundle: its sizes, and latencies measured when it was saved.

    Raises:
        PenjingError: the file cannot be read or is no bundle.
    """
    try:
        return dict(json.loads(_members(Path(path), [CARD])[CARD]))
    except (ValueError, TypeError) as error:
        raise PenjingError(
            f"{path}: {CARD} is not JSON ({error}); save the bundle again."
        ) from error


def _members(path: Path, wanted: Sequence[str] | None = None) -> dict[str, bytes]:
    """Read the members of the archive by name, all or those that are wanted."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_names(path, [entry.filename for entry in entries])
            for entry in entries:
                _check_size(path, entry)
            read = {entry.filename: entry for entry in entries}
            return {name: _content(path, archive, read[name]) for name in wanted or read}
    except OSError as error:
        raise PenjingError(f"{path} cannot be read: {error.strerror or error}.") from error
    except DAMAGE as error:
        raise PenjingError(
            f"{path} is no bundle or is damaged ({error}); save it again."
        ) from error


def _check_names(path: Path, names: list[str]) -> None:
    for name in names:
        if name not in LARGEST or names.count(name) > 1:
            why = "is there twice" if name in LARGEST else "does not belong in one"
            raise PenjingError(
                f"{path} is no bundle: its member {name[:100]!r} {why}; save it again."
            )
    missing = [name for name in (PLAN, CARD, DETECTOR) if name not in names]
    if missing:
        raise PenjingError(
            f"{path} is no bundle: it holds no {missing[0]}; save it again with penjing attend bundle."
        )


def _check_size(path: Path, entry: zipfile.ZipInfo) -> None:
    """Raise PenjingError before a member is read that declares more bytes than it has or may have."""
    name, limit = entry.filename, LARGEST[entry.filename]
    if entry.compress_type != zipfile.ZIP_STORED:
        raise PenjingError(
            f"{path}: its member {name} is compressed, which bundles do not allow; save it again."
        )
    there = min(entry.compress_size, path.stat().st_size)
    if entry.file_size > limit or entry.file_size != there:
        raise PenjingError(
            f"{path}: its member {name} declares {entry.file_size:,} bytes, has {there:,}, and may "
            f"have {limit:,}; save it again."
        )


def _content(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(entry)
    except DAMAGE as error:
        raise PenjingError(
            f"{path}: its member {entry.filename} is damaged ({error or 'it ends too early'}); save it "
            "again."
        ) from error


def _plan(path: Path, members: dict[str, bytes]) -> Plan:
    try:
        plan = Plan.model_validate_json(members[PLAN])
    except ValidationError as error:
        place, reason = invalid(error)
        raise PenjingError(
            f"{path}: {PLAN}: {place or 'document'}: {reason:.200}; save it again."
        ) from error
    if plan.model is not None and plan.model not in members:
        raise PenjingError(f"{path}: {plan.model} is missing from the bundle; save it again.")
    return plan


def _model_file(pipeline: Pipeline, folder: Path) -> Path | None:
    model = pipeline.model
    if model is None:
        return None
    if isinstance(model, File):
        target = folder / ("model.penjing" if model.packed else "model.onnx")
        target.write_bytes(model.content)
        return target
    widths = {(crop.height, crop.width) for crop in pipeline.crops}
    if not isinstance(model, Module) or len(widths) > 1 or None in next(iter(widths)):
        raise PenjingError(
            "Only a model that is a file, or a PyTorch module whose crops all have one height and "
            "width, can be saved in a bundle; export the model to ONNX first."
        )
    import torch

    from penjing.targets.onnxruntime.export import export

    crop = pipeline.crops[0]
    example = torch.zeros(1, crop.channels, crop.height, crop.width or 0)
    module = copy.deepcopy(model.module).cpu()
    export(module, example, target := folder / "model.onnx")
    return target


def _card(
    pipeline: Pipeline, detector: Path, model: Path | None, frames: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    return {
        "detector_bytes": detector.stat().st_size,
        "model_bytes": model.stat().st_size if model else None,
        "threads": pipeline.threads,
        "latencies": latencies(pipeline, frames),
    }


def latencies(pipeline: Pipeline, frames: Sequence[NDArray[np.uint8]]) -> dict[str, dict[str, Any]]:
    """Measure the latency, ms (median, 10th and 90th percentile), of the parts of ``pipeline``, timed
    in turns, without ``postprocess``; OpenCV has one thread.

    The parts are its detector and its gate, one object's crops with the model, a whole frame in which
    nothing or something is found, one between two runs of the detector, and one that the gate keeps
    from it. Parts that ``frames`` do not show are left out.

    Raises:
        PenjingError: there are no frames.
    """
    calls = _calls(pipeline, frames)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        timed = time_calls(list(calls.values()), runs=100)
    finally:
        cv2.setNumThreads(threads)
    return {
        name: {"median_ms": row.median_ms, "p10_ms": row.p10_ms, "p90_ms": row.p90_ms}
        for name, row in zip(calls, timed, strict=True)
    }


def _calls(
    pipeline: Pipeline, frames: Sequence[NDArray[np.uint8]]
) -> dict[str, Callable[[], object]]:
    if not frames:
        raise PenjingError("Latencies are measured on frames; give at least one.")
    seen = [(frame, pipeline.detector(frame)) for frame in frames]
    empty = next((frame for frame, found in seen if not len(found)), None)
    full = next(((frame, found) for frame, found in seen if len(found)), None)
    calls: dict[str, Callable[[], object]] = {"detector": lambda: pipeline.detector(seen[0][0])}
    if pipeline.motion is not None:
        gate = Gate(pipeline.motion)
        calls["motion gate"] = lambda: gate(seen[0][0])
    if empty is not None:
        calls["frame with nothing"] = lambda: _again(pipeline)(empty)
    if full is None:
        return calls
    picture, found = full
    if pipeline.crops:
        calls["crop and model, one object"] = lambda: pipeline.view(picture, [found[0]])
    calls[f"frame with {len(found)} found"] = lambda: _again(pipeline)(picture)
    if pipeline.every > 1:
        resting = _again(pipeline, every=NEVER)
        resting(picture)
        calls[f"frame between detections, {len(found)} found"] = lambda: resting(picture)
    if pipeline.motion is not None:
        still = _again(pipeline, motion=pipeline.motion.model_copy(update={"heartbeat": NEVER}))
        still(picture)
        calls["still frame"] = lambda: still(picture)
    return calls


def _again(pipeline: Pipeline, **changes: Any) -> Pipeline:
    """Make a copy of ``pipeline`` before its first frame, with ``changes``."""
    crops = pipeline.crops or None
    return Pipeline(pipeline.detector, crops, pipeline.model, enough=pipeline.enough, **changes)
