"""Deep Compression (Han et al. 2016) to the letter on both LeNets, then the smallest files of ours.

``python benchmarks/deep_compression.py [lenet_300_100] [lenet5]`` works on the nets named, or both,
and writes one result file a net. Trained nets and the stages of recipes are kept in the cache folder:
stop it, and the same command goes on. Errors are those of the ONNX file on the test images; that on
the validation images, by which settings are to be chosen, is told on the terminal.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import results
from frontier import CACHE, SHARED, named, need, penjing, row
from penjing import container, models, recipe, tasks
from penjing.container.streams import Coder
from penjing.devices import measurement
from penjing.targets.onnxruntime.export import export

ROOT = Path(__file__).parents[1]
FOLDER = CACHE / "deep-compression"
OURS = ROOT / "benchmarks" / "recipes"
PAPER = "Deep Compression (Han et al. 2016)"


@dataclass(frozen=True)
class Goal:
    """A recipe (its name or file), and the bytes and test error that its file is to reach."""

    recipe: str | Path
    bytes: int
    error: float


@dataclass(frozen=True)
class Net:
    """A net of the paper's table 1: its name there, bytes in float32 and the paper's result."""

    title: str
    epochs: int
    dense_bytes: int
    dense_error: float
    paper: Goal
    ours: tuple[Goal, ...]


NETS = {
    "lenet_300_100": Net(
        "LeNet-300-100", 30, 1_070_000, 0.0164,
        Goal("deep-compression-300-100", 27_000, 0.0158),
        (Goal(OURS / "lenet_300_100-8.5kb.yaml", 8_500, 0.018),),
    ),
    "lenet5": Net(
        "LeNet-5", 20, 1_720_000, 0.0080,
        Goal("deep-compression", 44_000, 0.0074),
        (Goal(OURS / "lenet5-3kb.yaml", 3_000, 0.008),
         Goal(OURS / "lenet5-1.5kb.yaml", 1_500, 0.010)),
    ),
}  # fmt: skip


def main() -> None:
    chosen = named(NETS)
    task = tasks.load("torchvision:MNIST", root=need(SHARED / "data" / "mnist"))
    for name in chosen:
        rows = _rows(name, NETS[name], task)
        command = f"python benchmarks/deep_compression.py {name}"
        results.write(f"deep_compression_{name}", rows, command)


def _rows(name: str, net: Net, task: tasks.Task) -> list[dict[str, Any]]:
    model = _trained(name, net)
    _, error = _measured(model, task, "arithmetic")
    table = [
        row(f"train {net.title}", "test error", error, net.dense_error, PAPER, None, None),
    ]
    for coder in ("huffman", "arithmetic"):
        work = f"{net.title}, the paper's pipeline, {coder}"
        table += _goal_rows(work, model, task, net.paper, coder, net, PAPER)
    for goal in net.ours:
        work = f"{net.title}, {Path(goal.recipe).stem}"
        table += _goal_rows(work, model, task, goal, "arithmetic", net, PAPER)
    return table


def _goal_rows(
    work: str, model: nn.Module, task: tasks.Task, goal: Goal, coder: Coder, net: Net, peer: str
) -> list[dict[str, Any]]:
    steps = recipe.load(goal.recipe)
    small = recipe.compress(model, task, steps, cache=FOLDER / "cache", progress=True)
    size, error = _measured(small, task, coder)
    paper = net.paper
    return [
        row(work, "packed file, bytes", size, paper.bytes, peer, f"at most {goal.bytes:,}",
            size <= goal.bytes),
        row(work, "times smaller than float32", net.dense_bytes / size,
            net.dense_bytes / paper.bytes, peer, None, None),
        row(work, "test error", error, paper.error, peer, f"at most {goal.error}",
            error <= goal.error),
    ]  # fmt: skip


def _trained(name: str, net: Net) -> nn.Module:
    weights = CACHE / f"{name}.safetensors"
    if not weights.exists():
        data = ("--data", "torchvision:MNIST", "--root", SHARED / "data" / "mnist")
        penjing("train", f"penjing:{name}", *data, "--epochs", net.epochs, "-o", weights)
    return models.load(f"penjing:{name}", weights=weights)


def _measured(model: nn.Module, task: tasks.Task, coder: Coder) -> tuple[int, float]:
    """Bytes of the whole ``.penjing`` file, and the test error of what it unpacks to."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file, packed, back = (FOLDER / name for name in ("net.onnx", "net.penjing", "back.onnx"))
    export(model, task.example, file, calibration=task.calibration(64))
    size = container.pack(file, packed, coder)
    container.unpack(packed, back)
    validation, test = (1 - measurement.score(back, task, part) for part in ("validation", "test"))
    print(f"{size} bytes, error {validation:.4f} validation, {test:.4f} test", file=sys.stderr)
    return size, test


if __name__ == "__main__":
    main()
