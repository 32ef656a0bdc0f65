"""Folding of norms and of parametrizations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.net import layers
from penjing.net.norms import fold_batch_norm, foldable


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class AddOne(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


class Shared(nn.Module):
    """The convolution's output is read by the norm and by the sum: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head, self.head_norm = nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2)

    def forward(self, image: Tensor) -> Tensor:
        features = self.conv(image)
        return self.head_norm(self.head(features + self.norm(features)))


def with_statistics(model: nn.Module) -> nn.Module:
    """Norms as after a training: with statistics, gains and shifts of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                nn.init.normal_(values)
            for values in (module.running_var, module.weight):
                nn.init.uniform_(values, 0.5, 2)
    return model.eval()


def test_norms_fold_where_they_follow_a_layer_and_only_there() -> None:
    model, image = with_statistics(Shared()), torch.randn(2, 3, 8, 8)
    expected = model(image)
    assert foldable(model, image) == [("head", "head_norm")]
    assert fold_batch_norm(model, image) == ["head"]
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert isinstance(model.head_norm, nn.Identity)
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_folding_leaves_the_output_as_it_was(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    model, image = torchvision.models.get_model(name).eval(), torch.randn(1, 3, 64, 64)
    expected = model(image)
    folded = fold_batch_norm(model, image)
    left = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert folded
    assert bool(left) == (name == "densenet121"), "its norms follow concatenations"
    torch.testing.assert_close(model(image), expected, rtol=1e-3, atol=1e-4)


def test_a_fold_takes_those_before_it_along_and_leaves_those_after() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    for link in (Double(), AddOne(), Double()):
        parametrize.register_parametrization(layer, "weight", link)
    expected = layer.weight.detach().clone()
    assert layers.fold(layer, AddOne)
    torch.testing.assert_close(layers.original(layer), weight * 2 + 1)
    torch.testing.assert_close(layer.weight, expected)
    assert not layers.fold(layer, AddOne)
    assert layers.fold(layer, Double)
    assert not parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer.weight, expected)


def test_norms_fold_below_parametrizations() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    image = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)(image)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert fold_batch_norm(model, image) == ["0"]
    assert parametrize.is_parametrized(model[0])
    torch.testing.assert_close(model(image), expected)


def test_folding_a_copy_leaves_the_model_it_was_copied_from_alone() -> None:
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Double())
    expected = layer.weight.detach().clone()
    assert layers.fold(copy.deepcopy(layer), Double)
    torch.testing.assert_close(layer.weight, expected)
    assert parametrize.is_parametrized(layer, "weight")
