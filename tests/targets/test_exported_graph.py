"""Where every weight of a graph comes from, and graphs that are exported once for a structure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Permute

from penjing.devices import measurement
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import exported_graph
from penjing.targets.onnxruntime.export import export, lower
from penjing.targets.onnxruntime.exported_graph import exported
from penjing.tasks import Task
from penjing.techniques import apply, techniques

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """Projections of a vision transformer: linear layers on tokens, square and not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x).flatten(2).transpose(1, 2)).relu().mean(1))


class Tied(nn.Module):
    """One weight, read by two layers, once as it is and once transposed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.down, self.up = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.up(self.down(x).relu()).mean(1) + (x @ self.down.weight).mean(1)


class Activated(nn.Module):
    """Nets of one structure but for a setting that no parameter shows."""

    def __init__(self, slope: float, kind: str = "leaky") -> None:
        super().__init__()
        self.conv, self.slope, self.kind = nn.Conv2d(3, 8, 3), slope, kind
        self.table = torch.linspace(0, slope, 8).view(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = nn.functional.leaky_relu(x, self.slope) if self.kind == "leaky" else x.sigmoid()
        return (x + self.table).mean((2, 3))


def scaled(model: nn.Module, gain: float = 3.0) -> nn.Module:
    for parameter in model.parameters():
        parameter.data.mul_(gain)
    return model.eval()


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quantize", {"activation_bits": None}),
        ("quantize", {"weight_bits": 4, "activation_bits": None}),
        ("quantize", {"weight_bits": 16, "activation_bits": None}),
        ("share_weights", {}),
        ("compress_weights", {"distortion": 1e-9}),
    ],
)
def test_square_layers_on_tokens_are_stored_as_they_are_read(
    width: int, name: str, settings: dict, task: Task, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    small = apply(techniques()[name](**settings), scaled(Tokens(width)), task)
    export(small, task.example, tmp_path / "m.onnx", calibration=task.calibration(32))
    found = measurement.agreement(small, tmp_path / "m.onnx", task.calibration(32))
    assert found.max_error < 1e-4 and found.distance < 1e-4


def test_a_tied_weight_is_the_weight_of_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    lowered = lower(model, IMAGE, tmp_path / "m.onnx")
    assert measurement.agreement(model, tmp_path / "m.onnx", [IMAGE]).max_error < 1e-5
    assert set(lowered.places) == {"stem", "down", "up"}


def test_a_structure_is_exported_once_and_takes_any_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: calls.append(1) or real(*a, **k))
    exported_graph._template.cache_clear()
    for seed, norm in ((0, nn.BatchNorm2d(8)), (1, nn.BatchNorm2d(8)), (2, nn.Identity())):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten()).eval()
        if seed < 2:
            nn.init.normal_(norm.running_mean)
        export(model, IMAGE, tmp_path / f"{seed}.onnx")
        assert measurement.agreement(model, tmp_path / f"{seed}.onnx", [IMAGE]).max_error < 1e-5
    assert len(calls) == 1, "folded norms leave the structure that a net without norms has"


def test_what_no_parameter_shows_is_part_of_the_structure(tmp_path: Path) -> None:
    for index, model in enumerate(
        (Activated(0.1), Activated(0.2), Activated(0.2, "sigmoid"), Activated(0.3))
    ):
        torch.manual_seed(0)
        model.conv.reset_parameters()
        export(model.eval(), IMAGE, tmp_path / f"{index}.onnx")
        assert measurement.agreement(model, tmp_path / f"{index}.onnx", [IMAGE]).max_error < 1e-5


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # this line
            x = x * 2
        return x


def test_the_line_that_cannot_be_exported_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    line = next(
        n for n, t in enumerate(Path(__file__).read_text().splitlines(), 1) if "# this" in t
    )
    place = re.escape(f"change line {line} of {__file__}: if x.mean() > 0:")
    with pytest.raises(PenjingError, match=f"data-dependent.*; {place}") as error:
        exported(Deciding(), torch.ones(1, 3, 8, 8), 21)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_line_of_another_package_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Permute([0, 2]))
    with pytest.raises(PenjingError, match=r"of .*torchvision/ops/misc.py: return torch.permute"):
        exported(net, torch.ones(1, 3, 8, 8), 21)


class Attention(nn.Module):
    """Attention of queries with ``axes`` axes, those before heads being images and windows."""

    def __init__(self, axes: int, mask: str) -> None:
        super().__init__()
        self.axes, self.mask, self.project = axes, mask, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :2].reshape(-1, 4, 16, 8)  # images, windows, tokens, width
        query, key, value = self.project(tokens).chunk(3, -1)
        if self.axes == 5:
            heads = [one.unflatten(-1, (2, 4)).transpose(2, 3) for one in (query, key, value)]
        else:
            heads = [one.flatten(1, 2) for one in (query, key, value)]
        count = heads[0].shape[-2]
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        if self.mask == "by window":
            mask = torch.stack([mask, mask.flip(0), mask, mask.T])[:, None]
        extra = {} if self.mask == "none" else {"attn_mask": mask}
        return F.scaled_dot_product_attention(*heads, **extra).flatten(1)


@pytest.mark.parametrize(
    ("axes", "mask"),
    [(3, "none"), (3, "one"), (5, "none"), (5, "one"), (5, "by window")],
)
def test_attention_of_any_number_of_axes(axes: int, mask: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Attention(axes, mask).eval(), torch.randn(3, 3, 16, 16)
    export(model, images[:1], tmp_path / "a.onnx")
    assert measurement.agreement(model, tmp_path / "a.onnx", [images]).distance < 1e-5
