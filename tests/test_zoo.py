"""Nets of many families through the techniques: every file does what its model does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from penjing import tasks

pytest.importorskip("timm")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("zoo", BENCHMARKS / "zoo.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_resnet",
        "timm:test_convnext",  # layer norms, linear layers on maps
        "timm:test_efficientnet",  # norms with an activation, squeeze and excite
        "timm:test_vit",
        "timm:test_vit_relpos",  # attention with a mask
        "timm:test_mambaout",
        "timm:test_nfnet",  # standardized weights
        "timm:test_byobnet",
        "timm:lcnet_035",
        "torchvision:shufflenet_v2_x0_5",  # channels that are split and shuffled
        "torchvision:squeezenet1_1",
    ],
)
def test_every_layer_runs_on_integers_and_the_file_is_the_model(zoo: ModuleType, name: str):
    model, size = zoo._net(name)
    images = zoo._images(size)
    labels = np.arange(len(images)) % zoo.CLASSES
    task = tasks.from_arrays(images, labels, validation=10, test=10)
    model = zoo._with_statistics(model, task)
    found = zoo._judged(model, task, zoo.TECHNIQUES["W8A8"])  # raises where they disagree
    assert found["result"] == "passes" and found["float_kernels"] == 0
    assert set(found["formats"]) == {"int8"} and found["layers"] >= 15


@pytest.mark.slow
def test_no_net_of_the_zoo_is_a_fault(zoo: ModuleType, tmp_path: Path, monkeypatch):
    """All nets: hours. What is rejected is one sentence."""
    monkeypatch.setattr(zoo, "LINES", tmp_path / "zoo.jsonl")
    monkeypatch.setattr(zoo, "SUMMARY", tmp_path / "zoo.json")
    zoo._import()
    zoo._run(zoo._names(), jobs=2, limit=900)
    lines = [json.loads(line) for line in (tmp_path / "zoo.jsonl").read_text().splitlines()]
    assert len({line["net"] for line in lines}) == len(zoo._names())
    assert not [line for line in lines if line["result"] == "fault"]
    assert all("\n" not in line["said"] for line in lines)
