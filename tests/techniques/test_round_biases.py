import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penjing.errors import PenjingError
from penjing.quantization import grids
from penjing.tasks import Task, from_arrays
from penjing.techniques.round_biases import RoundBiases, round_biases


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    return from_arrays(images, np.arange(40) % 2, validation=4, test=4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(288, 2)).eval()


def test_a_worked_example(task):
    """With 4 bits integers reach 7: the step for 0.8 is 1/8, not 1/16, which reaches 0.4375."""
    model = net()
    with torch.no_grad():
        model[4].bias.copy_(torch.tensor([0.8, -0.2]))
    assert round_biases(model, task, bits=4)[4].bias.tolist() == [0.75, -0.25]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), st.integers(2, 16))
def test_the_step_is_the_smallest_that_reaches(values, bits):
    bias = torch.tensor(values)
    step, largest = grids.step_for(bias, bits), float(bias.abs().max())
    reach = 2 ** (bits - 1) - 1
    assert np.frexp(step)[0] == 0.5
    if largest > 0:
        assert step * reach >= largest * (1 - 1e-6)
        assert step / 2 * reach <= largest * (1 + 1e-6)


def test_training_goes_on_with_the_rounding_in_place(task):
    model = net()
    attached = RoundBiases(bits=3).attach(model, task)
    output = model(task.example)
    output.sum().backward()
    assert model[4].parametrizations.bias.original.grad.tolist() == [1.0, 1.0]
    attached.bake(model)
    assert torch.equal(model(task.example), output)
    for layer in (model[0], model[4]):
        steps = layer.bias.detach() / grids.step_for(layer.bias.detach(), 3)
        assert torch.equal(steps, steps.round()) and steps.abs().max() <= 4
    assert isinstance(model[1], nn.Identity)


def test_a_net_without_biases_is_told(task):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).eval()
    with pytest.raises(PenjingError, match="no convolution or linear layer with a bias"):
        round_biases(model, task)
