"""Settings by layer, against what the exported file holds, counted zeros and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from penjing import recipe
from penjing.errors import PenjingError
from penjing.net.layers import compressible
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, from_arrays
from penjing.techniques import apply, techniques


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    return from_arrays(images, np.arange(64) % 4)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4),
    ).eval()  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.outer, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.outer(self.inner(x).relu())).relu().mean((2, 3)))


def used(net: nn.Module, task: Task, name: str, **settings: Any) -> nn.Module:
    """After a way through YAML-like data, as a recipe has it."""
    stages = [{"techniques": [{name: settings}]}]
    return recipe.compress(net, task, recipe.parse({"stages": stages}))


def stored(net: nn.Module, task: Task, folder: Path) -> dict[str, str]:
    """The type of the largest initializer of each layer in the file, by the layer's name."""
    export(net, task.example, folder / "a.onnx", calibration=task.calibration(16))
    found: dict[str, str] = {}
    tensors = onnx.load(folder / "a.onnx").graph.initializer
    for tensor in sorted(tensors, key=lambda one: int(np.prod(one.dims))):
        if ".weight" in tensor.name:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            found[tensor.name.partition(".weight")[0]] = kind
    return found


def test_mixed_precision_is_in_the_file(net: nn.Module, task: Task, tmp_path: Path) -> None:
    bits = {"0": 16, "[24]": 4, "8": None}
    small = used(net, task, "quantize", weight_bits=bits, activation_bits=None, calibration=16)
    kinds = {"0": "INT16", "2": "INT4", "4": "INT4", "8": "FLOAT", "10": "INT8"}
    assert stored(small, task, tmp_path) == kinds


def test_inputs_and_scales_by_layer(net: nn.Module, task: Task) -> None:
    settings = {"activation_bits": {"0": None, "4": 16}, "scales": {"8": "layer"}}
    small = used(net, task, "quantize", **settings, calibration=16)
    inputs = {n: getattr(m, "input_quantizer", None) for n, m in compressible(small).items()}
    found = {name: one.bits if one is not None else None for name, one in inputs.items()}
    assert found == {"0": None, "2": 8, "4": 16, "8": 8, "10": 8}
    scales = {n: len(m.weight_format.scale.unique()) for n, m in compressible(small).items()}
    assert scales == {"0": 16, "2": 16, "4": 32, "8": 1, "10": 4}


def test_one_bit_anywhere_has_no_zero(net: nn.Module, task: Task) -> None:
    techniques = [
        {"prune_weights": {"sparsity": 0.5}},
        {"quantize": {"weight_bits": {"4": 1, "*": 8}}},
    ]
    with pytest.raises(PenjingError, match="quantize to 1 bit comes after prune_weights, but has"):
        recipe.parse({"stages": [{"techniques": techniques}]})


def test_patterns_of_zeros_by_layer(net: nn.Module, task: Task) -> None:
    small = used(net, task, "prune_weights", pattern={"4": "1:4", "10": None, "*": "2:4"})
    shares = {n: float((m.weight == 0).double().mean()) for n, m in compressible(small).items()}
    assert shares == {"0": 0, "2": 0, "4": 0.75, "8": 0.5, "10": 0}  # 3 and 1 inputs fit no block
    most = small[4].weight.movedim(1, -1).unflatten(-1, (-1, 4)).ne(0).sum(-1).max()
    assert most == 1


@pytest.mark.parametrize("ratios", [{"0": 0.25, "8": 0.5}, {"8": 0.5, "4": None, "[048]": 0.25}])
def test_channels_by_layer(ratios: dict, net: nn.Module, task: Task) -> None:
    small = used(net, task, "prune_channels", ratio=ratios)
    assert [len(m.weight) for m in compressible(small).values()] == [12, 12, 32, 12, 4]


def test_channels_that_go_together_need_one_ratio(task: Task) -> None:
    model = Residual().eval()
    together = {"stem": 0.5, "outer": 0.5}
    small = used(model, task, "prune_channels", ratio={"inner": 0.25, **together})
    assert [len(m.weight) for m in compressible(small).values()] == [8, 6, 8, 4]
    with pytest.raises(PenjingError, match=r"outer \(0.5\).*; give them one ratio, or null"):
        used(model, task, "prune_channels", ratio={"outer": 0.5})
    with pytest.raises(PenjingError, match="'head', which none of its layers is called"):
        used(model, task, "prune_channels", ratio={"head": 0.5})


@pytest.mark.parametrize("aim", ["ratio", "variance"])
def test_only_named_layers_are_factorized(aim: str, net: nn.Module, task: Task) -> None:
    small = used(net, task, "factorize", **{aim: {"4": 0.3}})
    assert isinstance(small[4], nn.Sequential)
    assert all(isinstance(small[i], nn.Conv2d | nn.Linear) for i in (0, 2, 8, 10))
    if aim == "ratio":
        sizes = [sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in (net[4], small[4])]
        assert sizes[1] <= 0.7 * sizes[0]


def test_codebooks_and_biases_by_layer(net: nn.Module, task: Task) -> None:
    shared = used(net, task, "share_weights", bits={"4": 2, "0": None})
    values = {n: len(m.weight.unique()) for n, m in compressible(shared).items()}
    assert values == {"0": 432, "2": 32, "4": 4, "8": 32, "10": 32}
    rounded = used(net, task, "round_biases", bits={"4": 2, "8": None})
    layers = compressible(rounded)
    assert torch.equal(layers["8"].bias, net[8].bias)
    assert set((layers["4"].bias / layers["4"].bias.abs().max()).unique().tolist()) <= {-1, 0, 1}
    assert 4 < len(layers["0"].bias.unique()) <= 16


def test_the_first_pattern_that_fits_counts_in_the_key_of_a_stage(
    net: nn.Module, task: Task
) -> None:
    def key(bits: dict) -> str:
        stages = [{"techniques": [{"quantize": {"weight_bits": bits}}]}]
        return recipe.stage_keys(net, task, recipe.parse({"stages": stages}), net)[0]

    assert key({"4": 4, "*": 8}) != key({"*": 8, "4": 4})


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("quantize", "weight_bits", 4),
        ("quantize", "activation_bits", 8),
        ("quantize", "scales", "layer"),
        ("prune_weights", "sparsity", 0.5),
        ("prune_weights", "pattern", "2:4"),
        ("prune_channels", "ratio", 0.5),
        ("factorize", "ratio", 0.5),
        ("factorize", "variance", 0.5),
        ("share_weights", "bits", 4),
        ("round_biases", "bits", 4),
    ],
)
def test_a_pattern_of_no_layer_names_the_layers(name, setting, value, net, task) -> None:
    technique = techniques()[name](**{setting: {"conv1": value, "*": value}})
    message = rf"{name}: {setting} is given for 'conv1', which none .*; they are .*4.*\.$"
    with pytest.raises(PenjingError, match=message):
        apply(technique, net, task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": {"weight_bits": 3}}, "quantize.weight_bits: must be 16, 8, .* found 3$"),
        ({"quantize": {"weight_bits": {"a*": 3}}}, r"quantize.weight_bits.a\*: must .* found 3$"),
        ({"quantize": {"weight_bits": None}}, "quantize.weight_bits: must be .* found None$"),
        ({"prune_weights": {"pattern": {"a": "4:2"}}}, "prune_weights.pattern.a: pattern '4:2' is"),
        ({"quantize": {"weight_bits": {1.1: 4}}}, r"text, found 1\.1; put it in quotes$"),
        ({"prune_channels": {"ratio": {"a": 2}}}, "prune_channels.ratio.a: must be less than 1"),
    ],
)
def test_a_wrong_value_names_its_pattern(settings: dict, message: str) -> None:
    with pytest.raises(PenjingError, match=message):
        recipe.parse({"stages": [{"techniques": [settings]}]})


def test_a_number_names_a_layer_of_a_sequence() -> None:
    stages = [{"techniques": [{"quantize": {"weight_bits": {4: 4, "*": 8}}}]}]
    assert recipe.parse({"stages": stages}).techniques[0].weight_bits == {"4": 4, "*": 8}


def test_no_layer_to_prune_is_said(net: nn.Module, task: Task) -> None:
    with pytest.raises(PenjingError, match="layer to prune; leave it out"):
        used(net, task, "prune_weights", sparsity={"*": None})


@pytest.mark.parametrize("bits", [True, {"*": True}])
def test_a_flag_is_no_number_of_bits(bits) -> None:
    with pytest.raises(PenjingError, match="must be 16, 8, 4, 2 or 1, found True"):
        recipe.parse({"stages": [{"techniques": [{"quantize": {"weight_bits": bits}}]}]})
