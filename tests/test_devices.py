"""Everything that trains or calibrates works on the model's device, and takes its batches there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fake_device import FakeDeviceTensor, fake_device
from penjing import recipe as recipes
from penjing.devices import artifact, measurement
from penjing.tasks import Task, evaluate, from_arrays
from penjing.techniques import techniques
from penjing.training import TrainSettings, seconds_per_epoch, train

# Each technique, and those of its settings that go other ways through the code.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("prune_channels", {"ratio": 0.3}),
    ("prune_channels", {"ratio": 0.3, "importance": "taylor"}),
    ("prune_weights", {"sparsity": 0.5}),
    ("factorize", {"ratio": 0.3}),
    ("factorize", {"variance": 0.99}),
    ("share_weights", {"bits": 4}),
    ("quantize", {"weight_bits": 8, "activation_bits": 8, "calibration": 32}),
    ("quantize", {"weight_bits": 4, "calibration": 32}),
    ("compress_weights", {"distortion": 1e-6, "calibration": 32}),
    ("round_biases", {"bits": 8}),
    ("penalize_entropy", {"max_bytes": 3_000}),
]
# Trainings of these take long where every operation passes through Python.
LONG = ("compress_weights", "penalize_entropy")
TRAINED = [
    pytest.param(name, settings, marks=pytest.mark.slow if name in LONG else ())
    for name, settings in SETTINGS
]
TRAIN = {"epochs": 1, "batch_size": 16, "optimizer": "adamw", "ema": 0.9, "distill": {}}


@pytest.fixture(scope="module")
def task() -> Task:
    dice = np.random.default_rng(0)
    labels = np.arange(96) % 2
    images = dice.integers(0, 100, (96, 8, 8, 1)) + 100 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels, validation=16, test=16)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def assert_there(model: nn.Module) -> None:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        assert isinstance(tensor, FakeDeviceTensor)


def test_a_forgotten_move_is_found(task: Task) -> None:
    """What the other tests stand on: the fake device refuses what a GPU refuses."""
    with fake_device() as device:
        model = net().to(device)
        with pytest.raises(RuntimeError, match="one device"):
            model(task.example)
        assert model(task.example.to(device)).device == device
        with pytest.raises(RuntimeError, match="one device"):
            model[7].weight.data.add_(torch.ones(2, 16))
        with pytest.raises((RuntimeError, TypeError)):
            model[7].weight.detach().numpy()
        values = model[7].weight.detach().cpu()
    assert type(values) is torch.Tensor


def test_every_technique_is_tried() -> None:
    assert {name for name, _ in SETTINGS} >= set(techniques()) - {"distill"}


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_a_technique_works_where_the_model_is(
    name: str, settings: dict[str, Any], task: Task
) -> None:
    stage: dict[str, Any] = {"techniques": [{name: settings}]}
    if techniques()[name](**settings).needs_training:
        stage["train"] = TRAIN
    with fake_device() as device:
        small = recipes.compress(net().to(device), task, recipes.parse({"stages": [stage]}))
        assert_there(small)
        assert evaluate(small, task, "validation") >= 0


@pytest.mark.parametrize(("name", "settings"), TRAINED)
def test_a_technique_trains_where_the_model_is(
    name: str, settings: dict[str, Any], task: Task, tmp_path: Path
) -> None:
    steps = recipes.parse({"stages": [{"techniques": [{name: settings}], "train": TRAIN}]})
    with fake_device() as device:
        model = net().to(device)
        small = recipes.compress(model, task, steps, cache=tmp_path)
        assert_there(small)
        again = recipes.compress(model, task, steps, cache=tmp_path)
        assert_there(again)


def test_a_training_resumes_where_the_model_is(task: Task, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, batch_size=16, ema=0.9)
    with fake_device() as device:
        train(net().to(device), task, settings, checkpoint=tmp_path / "c")
        train(net().to(device), task, settings, checkpoint=tmp_path / "c")
        assert seconds_per_epoch(net().to(device), task) > 0


@pytest.mark.parametrize("settings", [{"weight_bits": 8, "activation_bits": 8}, {"weight_bits": 4}])
def test_an_artifact_is_built_of_a_model_that_is_there(
    settings: dict[str, Any], task: Task, tmp_path: Path
) -> None:
    """It is the file of the same model on the CPU."""
    steps = recipes.parse({"stages": [{"techniques": [{"quantize": settings}]}]})
    with fake_device() as device:
        there = recipes.compress(net().to(device), task, steps)
        card = artifact.build(there, task, tmp_path / "there", recipe=steps.to_dict())
        batches = task.calibration(32)
        agreement = measurement.agreement(there, tmp_path / "there" / "model.onnx", batches)
    artifact.build(recipes.compress(net(), task, steps), task, tmp_path / "here", recipe=None)
    assert card.export_top1_agreement == agreement.top1 == 1.0
    files = [(tmp_path / place / "model.onnx").read_bytes() for place in ("there", "here")]
    assert files[0] == files[1]
