import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from penjing.net import layers, observation
from penjing.quantization.grids import WeightQuantizer
from penjing.quantization.output_correction import correct_outputs, sharpen


@pytest.mark.parametrize("scales", [1, 6])
def test_outputs_get_their_means_and_spread_back(scales: int) -> None:
    """Of each channel, or of all channels together where they share one scale."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()
    images = torch.randn(32, 3, 8, 8)
    found = layers.compressible(net)
    known = observation.collect(net, found, [images], moments=False)
    with torch.no_grad():
        before = net[0](images)
        net[0].weight.mul_(0.8).add_(0.02 * torch.randn_like(net[0].weight))
    quantizer = WeightQuantizer(torch.full((scales,), 0.01), 8)
    parametrize.register_parametrization(net[0], "weight", quantizer, unsafe=True)
    codes = (net[0].weight / 0.01).detach().round()
    correct_outputs(net, {net[0]: quantizer}, {"0": net[0]}, known, images)
    with torch.no_grad():
        after = net[0](images)
        steps = net[0].weight / quantizer.scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    found_spread, spread = (one.std((0, 2, 3), correction=0) for one in (after, before))
    if scales == 1:
        found_spread, spread = found_spread.norm(), spread.norm()
    torch.testing.assert_close(found_spread, spread, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(steps, codes, atol=1e-3, rtol=0)


def test_answers_get_their_sharpness_back() -> None:
    """Of all gains, the one with the least divergence."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)).eval()
    images = torch.randn(64, 3, 2, 2)
    with torch.no_grad():
        net[3].weight.mul_(4)
        expected = net(images)
        net[3].weight.add_(0.3 * torch.randn_like(net[3].weight)).mul_(0.7)
        net[3].bias.mul_(0.7)
    quantizer = WeightQuantizer(torch.tensor([0.05]), 8)
    parametrize.register_parametrization(net[3], "weight", quantizer, unsafe=True)
    with torch.no_grad():
        before, codes = net(images), net[3].weight / quantizer.scale
    sharpen(net, {net[3]: quantizer}, layers.compressible(net), images, expected)
    with torch.no_grad():
        after, kept = net(images), net[3].weight / quantizer.scale
    torch.testing.assert_close(kept, codes, atol=1e-3, rtol=0)
    gain = float((after * before).sum() / before.square().sum())
    torch.testing.assert_close(after, gain * before)
    assert 1.1 < gain < 2
    tries = torch.linspace(0.5, 2, 301).tolist()
    least = min(divergence(factor * before, expected) for factor in tries)
    assert divergence(after, expected) <= least + 1e-6


@pytest.mark.parametrize("form", ["logit", "dict"])
def test_one_logit_gets_its_sharpness_back(form: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).eval()
    model = net if form == "logit" else Wrapped(net)
    images = torch.randn(64, 3, 2, 2)
    with torch.no_grad():
        expected = model(images)
        net[1].weight.mul_(0.7)
        net[1].bias.mul_(0.7)
    quantizer = WeightQuantizer(torch.tensor([0.05]), 8)
    parametrize.register_parametrization(net[1], "weight", quantizer, unsafe=True)
    with torch.no_grad():
        before = net(images)
    sharpen(model, {net[1]: quantizer}, layers.compressible(model), images, expected)
    with torch.no_grad():
        gain = float(net(images).norm() / before.norm())
    assert gain == pytest.approx(1 / 0.7, rel=0.05)


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logit": self.net(x), "mean": x.mean()}


def test_only_logits_are_sharpened() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()).eval()
    images = torch.randn(8, 3, 2, 2)
    before = net[1].weight.clone()
    sharpen(net, {}, layers.compressible(net), images, torch.randn(8, 5))
    assert torch.equal(net[1].weight, before)


def divergence(logits: torch.Tensor, expected: torch.Tensor) -> float:
    answers = expected.log_softmax(1)
    return float((answers.exp() * (answers - logits.log_softmax(1))).sum(1).mean())
