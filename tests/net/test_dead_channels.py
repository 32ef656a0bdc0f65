"""What is cut does nothing: the output stays; what does something stays."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penjing import models
from penjing.net import channels
from penjing.net.dead_channels import constant, cut_dead, zero_constant

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4),
    ).eval()  # fmt: skip


class Residual(nn.Module):
    """Two convolutions whose outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
        self.out = nn.Conv2d(5, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.a(x) + self.b(x)))


def widths(model: nn.Module) -> dict[str, int]:
    return {
        n: len(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }


@torch.no_grad()
def test_unread_and_constant_channels_go_and_the_output_stays():
    model = chain()
    model[5].weight[:, 2] = 0  # read by none
    model[0].weight[4] = 0  # made by none, and below zero before the ReLU
    model[1].bias[4], model[1].running_mean[4], model[0].bias[4] = -1, 0, 0
    model[3].bias[4] = -0.1
    expected = model(EXAMPLE)
    assert cut_dead(model, EXAMPLE[:1], round_to=1) == {"0": (8, 6), "3": (8, 6)}
    assert widths(model) == {"0": 6, "3": 6, "5": 6, "8": 4}
    torch.testing.assert_close(model(EXAMPLE), expected)


@torch.no_grad()
def test_a_channel_that_is_the_same_for_all_images_but_not_zero_stays():
    model = chain()
    model[0].weight[4] = 0
    model[1].bias[4] = 1
    assert cut_dead(model, EXAMPLE[:1], round_to=1) == {}
    zero_constant(model, channels.groups(model, EXAMPLE))
    assert cut_dead(model, EXAMPLE[:1], round_to=1) == {"0": (8, 7), "3": (8, 7)}


@torch.no_grad()
def test_a_sum_is_constant_only_if_all_its_terms_are():
    model = Residual().eval()
    model.a.weight[[1, 3]] = 0
    model.b.weight[[3, 4]] = 0
    groups = channels.groups(model, EXAMPLE)
    ((group, units),) = constant(model, groups)
    assert group.removed(group.root, units).tolist() == [3]
    zero_constant(model, groups)
    expected = model(EXAMPLE)
    assert cut_dead(model, EXAMPLE[:1], round_to=1) == {"a": (5, 4), "b": (5, 4)}
    torch.testing.assert_close(model(EXAMPLE), expected)


@torch.no_grad()
def test_classes_stay_and_so_does_one_channel_of_each_layer():
    model = chain()
    model[8].weight[1] = 0
    model[0].weight.zero_(), model[0].bias.zero_(), model[1].bias.fill_(-1)
    model[3].bias.fill_(-1)
    expected = model(EXAMPLE)
    cut_dead(model, EXAMPLE[:1], round_to=1)
    assert widths(model) == {"0": 1, "3": 1, "5": 6, "8": 4}
    torch.testing.assert_close(model(EXAMPLE), expected)


@torch.no_grad()
def test_what_fed_only_dead_channels_goes_with_them():
    model = chain()
    model[8].weight[:, 64:128] = 0  # channel 1 of the last convolution is not read
    model[5].weight[[0, *range(2, 6)], 3] = 0  # and it alone reads channel 3
    expected = model(EXAMPLE)
    assert cut_dead(model, EXAMPLE[:1], round_to=1) == {"0": (8, 7), "3": (8, 7), "5": (6, 5)}
    torch.testing.assert_close(model(EXAMPLE), expected)


@torch.no_grad()
def test_numbers_of_channels_stay_round():
    """5 of 8 channels are dead: one fills a block of 4, one that has no weights."""
    model = chain()
    model[5].weight[:, [1, 2, 4, 6, 7]] = 0
    model[0].weight[[2, 6]] = 0
    expected = model(EXAMPLE)
    assert cut_dead(model, EXAMPLE[:1]) == {}
    assert cut_dead(model, EXAMPLE[:1], round_to=4) == {"0": (8, 4), "3": (8, 4)}
    assert [bool(row.any()) for row in model[0].weight] == [True, False, True, True]
    assert cut_dead(model, EXAMPLE[:1], round_to=4) == {}
    torch.testing.assert_close(model(EXAMPLE), expected)


@functools.cache
def groups_of_resnet20() -> list[channels.Group]:
    model = models.load("penjing:resnet20_cifar").eval()
    return channels.groups(model, torch.zeros(1, 3, 32, 32))


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0.9, 0.999), seed=st.integers(0, 99))
@torch.no_grad()
def test_any_sparse_network_answers_as_before(share, seed):
    model = models.load("penjing:resnet20_cifar").eval()
    random = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight *= torch.rand(layer.weight.shape, generator=random) > share
            layer.weight *= torch.rand(len(layer.weight), 1, 1, 1, generator=random) > 0.3
    zero_constant(model, groups_of_resnet20())
    images = torch.randn(4, 3, 32, 32, generator=random)
    expected, before = model(images), sum(p.numel() for p in model.parameters())
    cut_dead(model, images[:1], round_to=1)
    torch.testing.assert_close(model(images), expected)
    assert sum(p.numel() for p in model.parameters()) < before


@pytest.mark.parametrize("used", [True, False])
@torch.no_grad()
def test_a_network_without_empty_channels_is_not_touched(used):
    model = chain()
    if used:
        model[5].weight *= torch.rand(model[5].weight.shape) > 0.5
    before = copy.deepcopy(model.state_dict())
    assert cut_dead(model, EXAMPLE[:1], round_to=1) == {}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
