"""The card against the file: formats, kernels, and a file that is not its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.devices import artifact
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import export
from penjing.tasks import Task, from_arrays
from penjing.techniques.quantize import quantize
from penjing.techniques.share_weights import share_weights


class Upsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(8, 4, 2, 2)
        self.own = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.up(self.down(x).relu()).relu(), self.own)
        return self.head(x.mean((2, 3)))


def stored_types(path: Path) -> dict[str, str]:
    """The independent reading: types of the initializers by name."""
    graph = onnx.load(path).graph
    return {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
def test_formats_are_read_from_the_file(bits: int, net: nn.Module, task: Task, tmp_path: Path):
    settings = {"weight_bits": bits, "first_last_bits": bits, "activation_bits": None}
    small = quantize(net, task, **settings, calibration=16)
    card = artifact.build(small, task, tmp_path, recipe=None)
    kinds = {layer["name"]: layer for layer in card.layers if layer["kind"] != "other"}
    assert {layer["format"] for layer in kinds.values()} == {f"int{bits}"}
    assert {layer["kernel"] for layer in kinds.values()} == {"float32"}
    suffix = {1: "_bits"}.get(bits, f"_int{bits}")
    types = stored_types(tmp_path / "model.onnx")
    assert types[f"branch.weight{suffix}"] == ("UINT8" if bits == 1 else f"INT{bits}")


@pytest.mark.parametrize("bits", [8, 4])
def test_one_weight_for_each_scale(bits: int, task: Task, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1, groups=6), nn.Flatten())
    net.append(nn.Linear(net(task.example).shape[1], 10))
    settings = {"weight_bits": bits, "first_last_bits": bits, "activation_bits": None}
    small = quantize(net, task, **settings, calibration=16)
    card = artifact.build(small, task, tmp_path, recipe=None)
    kinds = {layer["name"]: layer["format"] for layer in card.layers if layer["kind"] != "other"}
    assert kinds == dict.fromkeys("013", f"int{bits}")


def test_integer_kernels_are_read_from_the_runtime(net: nn.Module, task: Task, tmp_path: Path):
    card = artifact.build(quantize(net, task, calibration=16), task, tmp_path, recipe=None)
    kernels = {layer["name"]: layer["kernel"] for layer in card.layers if layer["kind"] != "other"}
    floats = sum(card.kernels.get(name, 0) for name in ("Conv", "FusedConv", "Gemm", "MatMul"))
    assert list(kernels.values()).count("float32") == floats == 0
    assert not any("run in float32" in note for note in card.notes)


def test_a_codebook_says_how_many_values(net: nn.Module, task: Task, tmp_path: Path) -> None:
    card = artifact.build(share_weights(net, task, bits=3), task, tmp_path, recipe=None)
    formats = {layer["name"]: layer["format"] for layer in card.layers}
    assert formats["branch"] == "shared, 8 values"


def test_what_stays_in_float_is_named_and_counted(task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = quantize(Upsampler().eval(), task, calibration=16)
    card = artifact.build(small, task, tmp_path, recipe=None)
    formats = {layer["name"]: layer["format"] for layer in card.layers}
    assert formats["down"] == formats["head"] == "int8" and formats["up"] == "float32"
    assert card.notes[0].startswith("2 of 3 convolutions run in float32")
    assert any("up, own: weights stored and run in float32" in note for note in card.notes)


def turned(model: onnx.ModelProto) -> str:
    """Another weight transposed: of the first square matrix, or kernels from the other end."""
    found = next(t for t in model.graph.initializer if t.name == "branch.weight")
    weight = numpy_helper.to_array(found)
    found.CopyFrom(numpy_helper.from_array(np.swapaxes(weight, 0, 1).copy(), found.name))
    return "distance"


def without_bias(model: onnx.ModelProto) -> str:
    found = next(t for t in model.graph.initializer if t.name == "head.2.bias")
    found.CopyFrom(numpy_helper.from_array(np.zeros(found.dims, np.float32), found.name))
    return "bias"


@pytest.mark.parametrize("change", [turned, without_bias])
def test_a_file_that_is_not_its_model_is_never_delivered(
    change: Callable[[onnx.ModelProto], str],
    net: nn.Module,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = export.lower

    def wrong(model: nn.Module, example: Tensor, path: Path, **options: object) -> export.Lowered:
        made = real(model, example, path, **options)  # type: ignore[arg-type]
        graph = onnx.load(path)
        change(graph)
        onnx.save(graph, path)
        return made

    monkeypatch.setattr(artifact, "lower", wrong)
    with pytest.raises(PenjingError, match="disagrees with the model"):
        artifact.build(net, task, tmp_path, recipe=None)
    assert list(tmp_path.iterdir()) == [], "nothing may be left of it"


def test_nan_agrees_with_nothing(task: Task, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1))
    model.append(nn.Flatten()).eval()
    model[1].running_var[0] = -1.0
    with pytest.raises(PenjingError, match="NaN"):
        artifact.build(model, task, tmp_path, recipe=None)


def test_nan_on_some_images_only_is_found(tmp_path: Path) -> None:
    """Logarithms of what is nowhere below zero on the first image."""

    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) + (x.mean((1, 2, 3)) + 0.9).log()[:, None]

    images = np.full((40, 8, 8, 3), 200, np.uint8)
    images[20:] = 0
    task = from_arrays(images, np.arange(40) % 2, validation=8, test=8)
    with pytest.raises(PenjingError, match="output 0 of the model is NaN on training images"):
        artifact.build(Log().eval(), task, tmp_path, recipe=None)
