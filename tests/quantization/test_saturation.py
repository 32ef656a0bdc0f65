import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penjing.quantization import grids
from penjing.quantization.saturation import safe_scale


def saturating_sums(codes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """What ``vpmaddubsw`` makes of one row of weights and inputs: 16-bit sums of two products."""
    products = codes.astype(np.int64) * pixels
    products = np.append(products, np.zeros(len(products) % 2, np.int64))
    return products.reshape(-1, 2).sum(1).clip(-(2**15), 2**15 - 1).sum()


def codes_of(layer: nn.Module, scale: Tensor) -> np.ndarray:
    rows = layer.weight.detach().movedim(1, -1).flatten(1)
    return grids.to_codes(rows / scale[:, None], 8).numpy()


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3), nn.Conv2d(3, 16, 3), nn.Linear(33, 16)])
def test_the_sums_are_exact(layer: nn.Module) -> None:
    torch.manual_seed(0)
    torch.nn.init.uniform_(layer.weight)  # of one sign: the worst case
    plain = grids.choose_scale(layer.weight.detach().flatten(1), 8)
    safe = safe_scale(layer, layer.weight.detach(), plain)
    bright = np.full(layer.weight[0].numel(), 255)
    for unsafe_codes, codes in zip(codes_of(layer, plain), codes_of(layer, safe), strict=True):
        assert saturating_sums(codes, bright) == (codes * bright).sum()
        assert saturating_sums(unsafe_codes, bright) != (unsafe_codes * bright).sum()
    assert (safe <= 2.1 * plain).all()


def test_a_safe_grid_is_left_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 16)
    scale = safe_scale(layer, layer.weight.detach(), grids.choose_scale(layer.weight.detach(), 8))
    on_grid = grids.to_codes(layer.weight / scale[:, None], 8) * scale[:, None]
    assert torch.equal(safe_scale(layer, on_grid.detach(), scale), scale)


def test_depthwise_convolutions_need_nothing() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8)
    nn.init.ones_(layer.weight)
    scale = torch.full((8,), 1 / 127)
    assert torch.equal(safe_scale(layer, layer.weight.detach(), scale), scale)
