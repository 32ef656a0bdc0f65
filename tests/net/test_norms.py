"""A norm folds where it alone reads what a layer makes, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from penjing.net.norms import fold_batch_norm, foldable

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Read(nn.Module):
    """``conv`` and ``norm``, with something else on the way between them or beside it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.norm = way, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.relu, self.other = nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)
        if way == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        made = self.conv(x)
        if self.way == "also returned":
            return self.norm(made), made
        if self.way == "a view also returned":
            return self.norm(made), made.flatten(1)
        if self.way == "also read":
            return self.norm(made) + made.mean()
        if self.way == "activation in place":
            return self.norm(self.relu(made))
        if self.way == "read by arithmetic in place":
            return self.norm(made.mul_(2))
        if self.way == "layer runs twice":
            return self.norm(made) + self.conv(x + 1)
        if self.way == "norm runs twice":
            return self.norm(made) + self.norm(self.other(x))
        if self.way == "norm behind two layers":
            return self.norm(made + self.other(x))
        if self.way == "tied":
            return self.norm(made) + self.other(x)
        return self.norm(made)


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize(
    "way",
    [
        "also returned", "a view also returned", "also read", "activation in place",
        "read by arithmetic in place", "layer runs twice", "norm runs twice",
        "norm behind two layers", "tied",
    ],
)  # fmt: skip
def test_a_norm_that_does_not_alone_read_the_layer_stays(way: str) -> None:
    model = with_statistics(Read(way))
    weight = model.conv.weight.clone()
    assert foldable(model, IMAGE) == [] and fold_batch_norm(model, IMAGE) == []
    assert isinstance(model.norm, nn.BatchNorm2d) and torch.equal(model.conv.weight, weight)


def test_a_norm_that_alone_reads_the_layer_folds() -> None:
    model = with_statistics(Read("alone"))
    expected = model(IMAGE)
    assert fold_batch_norm(model, IMAGE) == ["conv"] and isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, affine=False), FrozenBatchNorm2d(4), nn.SyncBatchNorm(4)],
)
def test_other_norms_with_statistics_fold(norm: nn.Module) -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm))
    expected = model(IMAGE)
    assert fold_batch_norm(model, IMAGE) == ["0"]
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_a_view_between_layer_and_norm_is_no_reader() -> None:
    """As in LeViT: a linear layer on tokens, and a norm over tokens and images together."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x.flatten(2))
            return self.norm(x.flatten(0, 1)).reshape_as(x)

    model = with_statistics(Tokens())
    image = torch.randn(1, 3, 2, 4)
    expected = model(image)
    assert fold_batch_norm(model, image) == ["linear"]
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_without_statistics_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norm(model, IMAGE) == []
