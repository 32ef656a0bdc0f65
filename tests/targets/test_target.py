"""Sizes that a target says without making files, against the files that it makes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from penjing import container
from penjing.net.layers import IntegerWeights, compressible
from penjing.targets.onnxruntime.export import export
from penjing.targets.target import STANDARD, FileSize

EXAMPLE = torch.zeros(1, 3, 8, 8)


def on_grids(step: float, channels: int = 16) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, 24, 3), nn.ReLU()
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(384, 10)).eval()
    for bits, layer in zip((8, 16, 8), compressible(net).values(), strict=True):
        codes = (layer.weight.detach() / step).round()
        layer.weight = nn.Parameter(codes * step)
        layer.weight_format = IntegerWeights(bits, torch.full((len(codes),), step))
        layer.bias = nn.Parameter((layer.bias.detach() * 64).round() / 64)
    return net


def file_bytes(net: nn.Module, folder: Path) -> int:
    export(net, EXAMPLE, folder / "a.onnx")
    return container.pack(folder / "a.onnx", folder / "a.penjing")


@pytest.mark.parametrize(("step", "channels"), [(0.01, 16), (0.02, 16), (0.08, 16), (0.02, 8)])
def test_estimates_are_near_the_file(step: float, channels: int, tmp_path: Path) -> None:
    sizes = FileSize(STANDARD, EXAMPLE)
    assert sizes.estimated(on_grids(0.005)) == file_bytes(on_grids(0.005), tmp_path)
    net = on_grids(step, channels)
    real = file_bytes(net, tmp_path)
    assert abs(sizes.estimated(net) - real) <= 16 + 0.005 * real
    assert sizes.measured(net) == sizes.estimated(net) == real


class Counting:
    """ONNX Runtime, which notes of which models it has made files."""

    name = STANDARD.name
    tensors = staticmethod(STANDARD.tensors)

    def __init__(self) -> None:
        self.made: list[nn.Module] = []

    def packed_bytes(self, model: nn.Module, example: Tensor) -> int:
        self.made.append(model)
        return STANDARD.packed_bytes(model, example)


def test_only_what_may_fit_is_made(tmp_path: Path) -> None:
    target = Counting()
    sizes = FileSize(target, EXAMPLE)
    first, large, small = on_grids(0.02), on_grids(0.01), on_grids(0.05)
    sizes.estimated(first)
    most = file_bytes(copy.deepcopy(first), tmp_path)
    assert not sizes.at_most(large, most)[0]
    assert target.made == [first]
    assert sizes.at_most(small, most) == (True, file_bytes(small, tmp_path))
    assert target.made == [first, small]


def test_the_process_that_runs_files_imports_neither_container_nor_pytorch() -> None:
    """Its memory is what a device needs."""
    code = "import sys, penjing.targets.onnxruntime.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "constriction", "penjing.container"} & set(done.stdout.split())
