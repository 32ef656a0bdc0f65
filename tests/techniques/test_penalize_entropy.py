import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from penjing import container, recipe
from penjing.devices import measurement
from penjing.errors import PenjingError
from penjing.net.dead_channels import cut_dead
from penjing.net.layers import compressible
from penjing.quantization import rate_model
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, evaluate, from_arrays
from penjing.techniques.penalize_entropy import PenalizedEntropy, PenalizeEntropy, _bits, _rounded
from penjing.training import TrainSettings, train

TRAIN = {"epochs": 6, "batch_size": 32, "optimizer": "adamw", "lr": 0.005, "augment": False}


@pytest.fixture(scope="module")
def task() -> Task:
    """Two kinds of stripes that a small net tells apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    images = rng.integers(0, 120, (600, 12, 12, 1)).astype(np.uint8)
    images[labels == 0, ::3] += 60
    images[labels == 1, :, ::3] += 60
    return from_arrays(images, labels)


@pytest.fixture(scope="module")
def net(task: Task) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    train(net, task, TrainSettings(**{**TRAIN, "epochs": 2}))
    return net


def small(net: nn.Module, task: Task, size: int, **settings: object) -> nn.Module:
    stage = {"techniques": [{"penalize_entropy": {"max_bytes": size}}], "train": TRAIN | settings}
    return recipe.compress(net, task, recipe.parse({"stages": [stage]}))


def file_bytes(net: nn.Module, task: Task, folder: Path) -> int:
    export(net, task.example, folder / "a.onnx")
    return container.pack(folder / "a.onnx", folder / "a.penjing")


@pytest.mark.parametrize("size", [2_000, pytest.param(5_000, marks=pytest.mark.slow)])
def test_the_file_is_no_larger_and_the_score_stays(
    size: int, net: nn.Module, task: Task, tmp_path: Path
) -> None:
    found = small(net, task, size)
    assert 0.8 * size < file_bytes(found, task, tmp_path) <= size
    graph = tmp_path / "a.onnx"
    container.unpack(tmp_path / "a.penjing", graph)
    assert measurement.score(graph, task, "validation") >= evaluate(net, task, "validation") - 0.03
    assert_grids_have_scales_of_few_bits(found)
    if size == 2_000:
        assert_channels_without_weights_are_cut(net, found, task)


def assert_grids_have_scales_of_few_bits(found: nn.Module) -> None:
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found.modules())
    for layer in compressible(found).values():
        scale = layer.weight_format.scale
        steps = layer.weight.detach() / scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        if len(scale.unique()) > 1:
            fractions = torch.frexp(scale)[0] * 16
            assert on_coarse_grid(scale) or torch.equal(fractions, fractions.round())
        else:
            fractions = torch.frexp(scale)[0] * 128
            assert torch.equal(fractions, fractions.round())
        assert on_coarse_grid(layer.bias)


def assert_channels_without_weights_are_cut(net: nn.Module, found: nn.Module, task: Task) -> None:
    before, after = ([len(m.weight) for m in compressible(n).values()] for n in (net, found))
    assert after[-1] == before[-1]
    assert sum(after) < sum(before)
    assert cut_dead(found, task.example) == {}


def test_scales_of_any_range_keep_their_size() -> None:
    near, far = torch.tensor([0.3, 0.11, -0.2]), torch.tensor([5.0, 0.011, -0.3])
    assert on_coarse_grid(_rounded(near)) and not on_coarse_grid(_rounded(far))
    for scale in (near, far):
        assert ((_rounded(scale) - scale).abs() <= scale.abs() / 16).all()


def on_coarse_grid(values: torch.Tensor) -> bool:
    """Whether they are multiples, at most 63 times, of a power of two."""
    fractions, exponents = torch.frexp(values.detach().abs().max())
    steps = values.detach() * 2.0 ** (6 - int(exponents))
    return float(fractions) > 0 and torch.equal(steps, steps.round())


def test_too_short_a_training_gives_the_size_all_the_same(
    net: nn.Module, task: Task, tmp_path: Path
) -> None:
    found = small(net, task, 2_500, epochs=0.1)
    assert file_bytes(found, task, tmp_path) <= 2_500


def test_no_room_for_weights_is_said_before_the_training(net: nn.Module, task: Task) -> None:
    with pytest.raises(PenjingError, match=r"file of 300 bytes is too small: \d+ bytes of it"):
        small(net, task, 300)


def test_not_finite_weights_are_named(net: nn.Module, task: Task) -> None:
    broken = copy.deepcopy(net)
    broken[3].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(PenjingError, match="weights of layer 3 hold NaN"):
        PenalizeEntropy(max_bytes=4_000).attach(broken, task)


def test_a_size_is_given_in_bytes_or_in_parts(net: nn.Module, task: Task, tmp_path: Path) -> None:
    stage = {"techniques": [{"penalize_entropy": {"times_smaller": 20}}], "train": TRAIN}
    found = recipe.compress(net, task, recipe.parse({"stages": [stage]}))
    whole = 4 * sum(parameter.numel() for parameter in net.parameters())
    assert whole / 25 < file_bytes(found, task, tmp_path) <= whole / 20


@pytest.mark.parametrize("settings", [{}, {"max_bytes": 4_000, "times_smaller": 20}])
def test_one_size_is_needed(settings: dict) -> None:
    with pytest.raises(ValidationError, match="either max_bytes"):
        PenalizeEntropy(**settings)


class StopError(Exception):
    """Ends a training as if it were killed."""


def test_an_interrupted_training_comes_to_the_same_weights(
    net: nn.Module, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAIN | {"epochs": 2}
    stage = {"techniques": [{"penalize_entropy": {"max_bytes": 4_000}}], "train": training}
    steps = recipe.parse({"stages": [stage]})
    whole = recipe.compress(net, task, steps)
    step = PenalizedEntropy.step

    def killed(self: PenalizedEntropy, model: nn.Module, progress: float) -> None:
        step(self, model, progress)
        if progress > 0.5:
            raise StopError

    monkeypatch.setattr(PenalizedEntropy, "step", killed)
    with pytest.raises(StopError):
        recipe.compress(net, task, steps, cache=tmp_path)
    monkeypatch.setattr(PenalizedEntropy, "step", step)
    again = recipe.compress(net, task, steps, cache=tmp_path)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_biases_of_few_bits_go_with_it(net: nn.Module, task: Task, tmp_path: Path) -> None:
    entries = [{"penalize_entropy": {"max_bytes": 3_000}}, {"round_biases": {"bits": 4}}]
    steps = recipe.parse({"stages": [{"techniques": entries, "train": TRAIN | {"epochs": 2}}]})
    found = recipe.compress(net, task, steps)
    for layer in compressible(found).values():
        coarse = 2**10 * layer.bias.detach()
        assert torch.equal(coarse, coarse.round())
    assert file_bytes(found, task, tmp_path) <= 3_000


def test_a_matrix_is_seen_in_eights_only_where_columns_have_to_do_with_their_neighbours() -> None:
    torch.manual_seed(0)
    runs = torch.rand(100, 20, 1).lt(0.1).expand(100, 20, 8).reshape(100, 160)
    near = runs * torch.randn(100, 160) * 4
    far = near.flatten()[torch.randperm(near.numel())].reshape(100, 160)
    plain = rate_model.bits(near[..., None])[1]
    assert _bits(near)[1] == rate_model.bits(near.reshape(100, 20, 8))[1] < 0.9 * plain
    assert _bits(far)[1] == rate_model.bits(far[..., None])[1]
