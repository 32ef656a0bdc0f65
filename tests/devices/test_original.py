"""A file beside the original's: which images count, and for what."""

from pathlib import Path

import pytest
import torch
from torch import nn

from penjing.devices import artifact, comparison
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, interval, outputs_of


@pytest.fixture
def original(net: nn.Module, task: Task, tmp_path: Path) -> comparison.Original:
    export(net, task.example, tmp_path / "model.onnx")
    return artifact.original(net, task, tmp_path)


@pytest.fixture
def other(net: nn.Module, task: Task, tmp_path: Path) -> nn.Module:
    torch.manual_seed(1)
    changed = type(net)().eval()
    changed.load_state_dict(net.state_dict())
    with torch.no_grad():
        changed.head[2].bias += torch.randn(10) / 2
    export(changed, task.example, tmp_path / "other.onnx")
    return changed


def test_files_compare_as_their_models_do(
    original: comparison.Original, net: nn.Module, other: nn.Module, task: Task, tmp_path: Path
) -> None:
    found = original.compared(tmp_path / "other.onnx", "validation", trained=True)
    outputs = [outputs_of(model, task.batches("validation"))[0] for model in (net, other)]
    target = torch.cat([labels for _, labels in task.batches("validation")])
    expected = interval.compare(task, *outputs, target).model_dump()
    assert found.model_dump() == pytest.approx(expected, abs=1e-4)
    assert found.agreement_images == 16


def test_training_images_make_up_for_few_unless_the_model_has_learned_from_them(
    original: comparison.Original,
    net: nn.Module,
    other: nn.Module,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = original.compared(tmp_path / "other.onnx", "validation", trained=False)
    same = []
    for split in ("validation", "train"):
        first, second = (outputs_of(m, task.batches(split))[0].argmax(1) for m in (net, other))
        same.append((first == second).double())
    assert found.agreement_images == 16 + 64
    assert found.agreement == pytest.approx(float(torch.cat(same).mean()))
    assert found.images == 16, "labels of training images count for nothing"
    monkeypatch.setattr(comparison, "AGREEMENT_IMAGES", 16)
    enough = original.compared(tmp_path / "other.onnx", "validation", trained=False)
    assert enough.agreement_images == 16
