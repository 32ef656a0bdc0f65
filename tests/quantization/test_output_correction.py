import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from penjing import layers
from penjing.quantization import statistics
from penjing.quantization.grids import WeightQuantizer
from penjing.quantization.output_correction import correct_outputs


@pytest.mark.parametrize("scales", [1, 6])
def test_outputs_get_their_means_and_spread_back(scales: int) -> None:
    """Of each channel, or of all channels together where they share one scale."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()
    images = torch.randn(32, 3, 8, 8)
    found = layers.compressible(net)
    known = statistics.collect(net, found, [images], moments=False)
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
