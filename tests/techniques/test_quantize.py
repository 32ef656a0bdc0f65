import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penjing.errors import PenjingError
from penjing.net import layers
from penjing.net.layers import IntegerWeights
from penjing.tasks import Task, from_arrays
from penjing.techniques.quantize import Quantize, quantize


@pytest.fixture(scope="module")
def task() -> Task:
    """Bright images are class 1."""
    rng = np.random.default_rng(0)
    labels = np.arange(128) % 2
    images = rng.integers(0, 128, (128, 8, 8, 3)) + 100 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels, validation=16, test=16)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    ).eval()


def formats(net: nn.Module) -> dict[str, IntegerWeights]:
    return {name: layer.weight_format for name, layer in layers.compressible(net).items()}


def codes(layer: nn.Module) -> Tensor:
    scale = layer.weight_format.scale
    return (layer.weight.detach() / scale.reshape(-1, *[1] * (layer.weight.dim() - 1))).round()


def outputs(net: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(batch) for batch, _ in task.batches("validation")])


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
def test_weights_lie_on_the_grid_that_the_format_states(
    bits: int, net: nn.Module, task: Task
) -> None:
    small = quantize(net, task, weight_bits=bits)
    assert [f.bits for f in formats(small).values()] == [max(bits, 8), bits, bits, max(bits, 8)]
    layer = layers.compressible(small)["3"]
    codes = layer.weight / layer.weight_format.scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(codes, codes.round(), atol=1e-2 if bits == 16 else 1e-4, rtol=0)
    low, high = {2: (-1, 1), 1: (-1, 1)}.get(bits, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    assert codes.min() >= low - 1e-3 and codes.max() <= high + 1e-3
    assert not hasattr(layer, "parametrizations")


def test_fewer_bits_are_further_from_the_original(net: nn.Module, task: Task) -> None:
    expected = outputs(net, task)
    errors = [
        float(
            (outputs(quantize(net, task, weight_bits=b, first_last_bits=b), task) - expected).norm()
        )
        for b in (8, 4, 2)
    ]
    assert errors == sorted(errors) and errors[0] < 0.03 * expected.norm()


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_every_observer(observer: str, net: nn.Module, task: Task) -> None:
    small = quantize(net, task, observer=observer)
    expected = outputs(net, task)
    assert (outputs(small, task) - expected).norm() < 0.05 * expected.norm()
    minmax = quantize(net, task, observer="minmax")
    for name, layer in layers.compressible(small).items():
        widest = layers.compressible(minmax)[name].input_quantizer.scale
        assert 0 < layer.input_quantizer.scale <= widest * 1.0001


def test_inputs_lie_on_their_grid_and_zero_is_exact(net: nn.Module, task: Task) -> None:
    small = quantize(net, task)
    quantizer = layers.compressible(small)["0"].input_quantizer
    x = torch.linspace(-2, 2, 1001)
    steps = quantizer(x) / quantizer.scale + quantizer.zero_point
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.min() >= -1e-3 and steps.max() <= 255.001
    assert quantizer(torch.zeros(1)) == 0
    assert not list(quantizer.parameters())


def test_activations_can_stay_float(net: nn.Module, task: Task) -> None:
    small = quantize(net, task, activation_bits=None)
    assert not any(hasattr(layer, "input_quantizer") for layer in small.modules())


def test_a_copy_of_a_quantized_model_uses_its_own_quantizer(net: nn.Module, task: Task) -> None:
    small = quantize(net, task)
    other = copy.deepcopy(small)
    expected = outputs(small, task)
    with torch.no_grad():
        for layer in layers.compressible(other).values():
            layer.input_quantizer.scale.mul_(30)
    assert torch.equal(outputs(small, task), expected)
    assert not torch.equal(outputs(other, task), expected)


def test_quantizing_again_keeps_the_integers(net: nn.Module, task: Task) -> None:
    once = quantize(net, task, weight_bits=4)
    twice = quantize(once, task, weight_bits=4)
    assert torch.equal(codes(once[3]), codes(twice[3]))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_zeros_of_a_sparse_layer_stay_zero(bits: int, net: nn.Module, task: Task) -> None:
    layer = net[3]
    with torch.no_grad():
        layer.weight[::2] = 0
        layer.weight[:, :, 1] = 0
    layer.sparse = True
    zeros = layer.weight == 0
    small = quantize(net, task, weight_bits=bits)
    assert (small[3].weight[zeros] == 0).all()
    assert (small[3].weight[~zeros] != 0).float().mean() > 0.3


def test_a_sparse_layer_cannot_have_one_bit(net: nn.Module, task: Task) -> None:
    net[3].sparse = True
    with pytest.raises(PenjingError, match="layer 3 is sparse"):
        quantize(net, task, weight_bits=1)


def test_every_channel_gets_its_mean_and_spread_back(net: nn.Module, task: Task) -> None:
    small = quantize(net, task, weight_bits=2, first_last_bits=2)
    batch = task.calibration(256)[0]
    with torch.no_grad():
        expected, found = net(batch), small(batch)
    torch.testing.assert_close(found.mean(0), expected.mean(0), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.std(0), expected.std(0), atol=1e-4, rtol=1e-3)


def test_nan_is_reported_by_layer(net: nn.Module, task: Task) -> None:
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[7].weight[0, 0] = torch.nan
    with pytest.raises(PenjingError, match="weights of layer 7 hold NaN"):
        quantize(broken, task)
    with torch.no_grad():
        net[3].bias[0] = torch.inf
    with pytest.raises(PenjingError, match="outputs of layer 3 are NaN or infinite"):
        quantize(net, task)


def test_training_with_two_bits_learns_and_bakes_what_it_trained(
    net: nn.Module, task: Task
) -> None:
    attached = Quantize(weight_bits=2).attach(net, task)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    scale = layers.compressible(net)["3"].parametrizations.weight[0].scale
    before = scale.detach().clone()
    losses = []
    for epoch in range(12):
        for images, labels in task.batches("train", 32, shuffle=True, seed=epoch):
            loss = task.loss(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    assert not torch.equal(scale, before)
    trained = outputs(net.eval(), task)
    attached.bake(net)
    torch.testing.assert_close(outputs(net, task), trained, atol=2e-3, rtol=2e-2)
