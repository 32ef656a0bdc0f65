from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from penjing import container
from penjing.container import trellis
from penjing.errors import PenjingError
from penjing.net.layers import compressible
from penjing.net.norms import fold_batch_norm
from penjing.net.patches import coding_order
from penjing.quantization import rate_distortion
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, evaluate, from_arrays
from penjing.techniques.compress_weights import CompressWeights, compress_weights
from penjing.techniques.round_biases import RoundBiases


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(96) % 4, validation=32, test=8)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 4),
    )  # fmt: skip
    net.train()(torch.randn(64, 3, 8, 8))
    return net.eval()


def file_bytes(net: nn.Module, task: Task, folder: Path) -> int:
    export(net, task.example, folder / "a.onnx")
    return container.pack(folder / "a.onnx", folder / "a.penjing")


def loss(net: nn.Module, small: nn.Module, task: Task) -> float:
    x = torch.cat([batch for batch, _ in task.batches("validation")])
    with torch.no_grad():
        found, wanted = small(x).log_softmax(1), net(x).log_softmax(1)
        return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def test_weights_lie_on_one_grid_a_layer(net: nn.Module, task: Task) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = compress_weights(net, task, distortion=1e-9)
    for layer in compressible(small).values():
        scale = layer.weight_format.scale
        assert (scale == scale[0]).all()
        codes = layer.weight.detach() / scale[0]
        assert codes.abs().max() > 3
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert loss(net, small, task) < 0.1


@pytest.mark.parametrize("size", [3_000, 6_000])
def test_the_file_has_the_size_that_was_asked_for(
    size: int, net: nn.Module, task: Task, tmp_path: Path
) -> None:
    small = compress_weights(net, task, max_bytes=size)
    assert 0.95 * size <= file_bytes(small, task, tmp_path) <= size


def test_layers_may_be_parametrized_already(net: nn.Module, task: Task, tmp_path: Path) -> None:
    fold_batch_norm(net, task.example)
    rounded = RoundBiases(bits=8).attach(net, task)
    CompressWeights(max_bytes=6_000).attach(net, task).bake(net)
    rounded.bake(net)
    assert 0.95 * 6_000 <= file_bytes(net, task, tmp_path) <= 6_000


def test_in_training_integers_do_not_depend_on_one_another(net: nn.Module, task: Task) -> None:
    run = CompressWeights(distortion=1e-9).attach(net, task)
    assert all(on_the_trellis(layer) for layer in compressible(net).values())
    run.step(net, 0.0)
    assert not any(on_the_trellis(layer) for layer in compressible(net).values())
    layer = compressible(net)["11"]
    step = layer.parametrizations["weight"][0].scale.detach()
    with torch.no_grad():
        layer.parametrizations["weight"].original.add_(step)
    moved = layer.weight.detach()
    run.step(net, 0.5)  # what has learned stays
    run.bake(net)
    torch.testing.assert_close(layer.weight.detach(), moved)


def on_the_trellis(layer: nn.Module) -> bool:
    step = layer.parametrizations["weight"][0].scale.detach()
    codes = (layer.weight.detach() / step).round().flatten(1).numpy().astype(np.int16)
    return trellis.obeyed(codes[:, coding_order(layer).numpy()])


def test_biases_that_the_correction_adds_are_rounded_and_only_kept_if_they_matter(
    task: Task,
) -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4, bias=False)
    net = nn.Sequential(*body).eval()
    small = compress_weights(net, task, distortion=1e-5)
    steps = small[3].bias.detach() * 2**10
    assert steps.any() and torch.equal(steps, steps.round())
    assert small[0].bias is None


def test_no_file_is_that_small(net: nn.Module, task: Task) -> None:
    with pytest.raises(PenjingError, match="max_bytes=100 is too small"):
        compress_weights(net, task, max_bytes=100)


def test_the_score_drops_no_further_than_allowed(net: nn.Module, task: Task) -> None:
    small = compress_weights(net, task, max_drop=0.07)
    assert evaluate(small, task, "validation") >= evaluate(net, task, "validation") - 0.07


@pytest.mark.parametrize("settings", [{}, {"distortion": 1e-5, "max_bytes": 1000}])
def test_one_aim_is_needed(settings: dict) -> None:
    with pytest.raises(ValidationError, match="give one of"):
        CompressWeights(**settings)


def test_weights_must_be_finite(net: nn.Module, task: Task) -> None:
    with torch.no_grad():
        net[0].weight[0] = torch.nan
    with pytest.raises(PenjingError, match="layer 0"):
        compress_weights(net, task, distortion=1e-5)


def test_a_drop_that_not_even_the_finest_grid_keeps_to_is_an_error(
    net: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finest grid is made as coarse as the coarsest."""
    monkeypatch.setattr(rate_distortion, "FINEST", rate_distortion.WIDEST)
    with pytest.raises(PenjingError, match=r"max_drop=0.001 cannot be met: the finest grid loses"):
        compress_weights(net, task, max_drop=0.001)
