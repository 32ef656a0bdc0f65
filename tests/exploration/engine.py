"""The engine with everything that takes time replaced: a candidate's figures come from its name."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from penjing.devices.artifact import Card
from penjing.exploration import search
from penjing.exploration.study import SAVED
from penjing.tasks import Task, from_arrays
from penjing.tasks.interval import exact_bounds

IMAGES = 200


@cache
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (IMAGES + 20, 4, 4, 1), dtype=np.uint8)
    whole = from_arrays(images, np.arange(IMAGES + 20) % 2, validation=IMAGES, test=2)
    return replace(whole, splits={name: whole.splits[name] for name in ("train", "validation")})


@cache
def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()


def build(
    model: object,
    task: Task,
    folder: Path,
    *,
    recipe: dict,
    device: object,
    reference: object = None,
) -> Card:
    """Files that hold the candidate's name, and figures made from it."""
    name = recipe["name"]
    size = 1000 if name == "original" else 200 + _dice(name, "size", 700)
    lost, gained = (
        (0, 0) if name == "original" else (_dice(name, "lost", 8), _dice(name, "gained", 4))
    )
    low, high = exact_bounds(lost, gained, IMAGES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(name.encode().ljust(2 * size))
    (folder / "model.penjing").write_bytes(name.encode().ljust(size))
    card = Card(
        name=name,
        recipe=recipe,
        params=100,
        macs=100 + _dice(name, "macs", 900),
        onnx_bytes=2 * size,
        packed_bytes=size,
        latency_ms=1 + _dice(name, "ms", 900) / 1000,
        latency_p10_ms=1.0,
        latency_p90_ms=2.0,
        reference_latency_ms=2.0,
        peak_rss_bytes=1,
        score=0.9 - (lost - gained) / IMAGES,
        split="validation",
        export_max_error=0.0,
        export_top1_agreement=1.0,
        images=IMAGES,
        drop=(lost - gained) / IMAGES,
        drop_low=low,
        drop_high=high,
        lost=lost,
        gained=gained,
        divergence=lost / 100,
        agreement=1 - (lost + gained) / IMAGES,
        agreement_images=IMAGES,
    )
    (folder / "card.json").write_text(card.model_dump_json())
    return card


def install(
    patch: pytest.MonkeyPatch, act: Callable[[str], object] = lambda name: None
) -> list[str]:
    """Replace what takes time. ``act`` is what each candidate does, given its name; returns the list
    of the candidates that were run, which grows."""
    run: list[str] = []

    def compress(model: object, task: Task, recipe: Any, **options: object) -> object:
        run.append(recipe.name)
        act(recipe.name)
        return model

    patch.setattr(search, "compress", compress)
    patch.setattr(search.artifact, "build", build)
    patch.setattr(search, "seconds_per_epoch", lambda *arguments, **options: 1.0)
    return run


def explored(folder: Path, **options: Any) -> search.Study:
    return search.explore(net(), task(), folder=folder, progress=False, **options)


def killed_after(seconds: float, work: Callable[[], object]) -> int:
    """Do ``work`` in a forked process, kill it after ``seconds`` (if it still runs); its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def names_in(folder: Path) -> set[str]:
    """Whose files lie in ``folder``, an artifact of this engine's."""
    found = {file.read_text().strip() for file in folder.glob("model.*")}
    cards = [folder / name for name in SAVED if name.endswith(".json")]
    return found | {json.loads(card.read_text())["name"] for card in cards}


def _dice(name: str, what: str, sides: int) -> int:
    digest = hashlib.sha256(f"{name}.{what}".encode()).digest()
    return math.floor(int.from_bytes(digest[:4]) / 2**32 * sides)
