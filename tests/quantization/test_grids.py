import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from penjing.net.input_quantizer import InputQuantizer
from penjing.quantization import grids
from penjing.quantization.grids import WeightQuantizer

WEIGHTS = st_numpy.arrays(
    np.float32,
    st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-100, 100, width=32),
)
BITS = st.sampled_from([16, 8, 4, 2, 1])


@given(WEIGHTS, BITS)
@settings(deadline=None)
def test_on_the_grid_and_idempotent(array: np.ndarray, bits: int) -> None:
    weight = torch.from_numpy(array)
    quantizer = WeightQuantizer(grids.choose_scale(weight, bits), bits)
    once = quantizer(weight).detach()
    low, high = grids.limits(bits)
    codes = once / quantizer.scale.detach()[:, None]
    torch.testing.assert_close(codes, codes.round(), atol=0.01, rtol=0)
    assert codes.min() >= low - 0.01 and codes.max() <= high + 0.01
    torch.testing.assert_close(quantizer(once).detach(), once)
    if bits > 1:
        assert (once[weight == 0] == 0).all()


@given(WEIGHTS)
@settings(deadline=None)
def test_eight_bits_are_at_most_half_a_step_off(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    scale = grids.choose_scale(weight, 8)
    error = (WeightQuantizer(scale, 8)(weight).detach() - weight).abs()
    assert (error <= 0.5 * scale[:, None] * 1.001 + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 2])
def test_the_search_beats_minmax(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    searched = grids.choose_scale(weight, bits)
    widest = weight.abs().amax(1) / grids.limits(bits)[1]

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (WeightQuantizer(scale, bits)(weight).detach() - weight).square().sum(1)

    assert (error(searched) <= error(widest)).all()
    assert error(searched).sum() < 0.9 * error(widest).sum()


def test_ternary_error_of_a_normal_distribution() -> None:
    """Max 1960, table I: the best uniform 3-level quantizer of N(0, 1) has error 0.1902."""
    torch.manual_seed(0)
    weight = torch.randn(1, 200_000)
    quantizer = WeightQuantizer(grids.choose_scale(weight, 2), 2)
    error = (quantizer(weight).detach() - weight).square().mean()
    assert float(error) == pytest.approx(0.1902, rel=0.02)


def test_gradients_pass_straight_through_inside_the_limits() -> None:
    weight = torch.tensor([[0.3, -0.7, 5.0, -5.0]], requires_grad=True)
    quantizer = WeightQuantizer(torch.tensor([1.0]), 2)
    quantizer(weight).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_the_scales_gradient_is_the_papers() -> None:
    """Esser et al. 2020, eq. 3, and its gradient scale 1 / sqrt(N Q_P)."""
    steps = torch.tensor([[0.3, -0.7, 20.0, -20.0]])
    quantizer = WeightQuantizer(torch.tensor([0.5]), 4)
    quantizer(steps * 0.5).sum().backward()
    expected = (0 - 0.3) + (-1 + 0.7) + 7 + -8
    assert float(quantizer.scale.grad) == pytest.approx(expected / (4 * 7) ** 0.5, rel=1e-5)


@given(st.floats(-50, 50), st.floats(-50, 50), st.sampled_from([8, 16]))
def test_input_grid_covers_its_range(a: float, b: float, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    quantizer = InputQuantizer(low, high, bits)
    step = float(quantizer.scale.detach())
    x = torch.tensor([low, high, 0.0])
    with torch.no_grad():
        assert ((quantizer(x) - x).abs() <= step * 1.01 + 1e-6).all()
        assert quantizer(x)[2] == 0


def test_inference_and_training_agree() -> None:
    torch.manual_seed(0)
    quantizer = InputQuantizer(-1.0, 3.0, 8)
    x = torch.randn(4, 100)
    with torch.no_grad():
        expected = quantizer(x)
    assert torch.equal(quantizer(x), expected)


def test_against_pytorchs_fake_quantization() -> None:
    torch.manual_seed(0)
    quantizer = InputQuantizer(-1.0, 3.0, 8)
    x = torch.randn(1000)
    scale, zero = float(quantizer.scale.detach()), int(quantizer.zero_point)
    peer = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    with torch.no_grad():
        torch.testing.assert_close(quantizer(x), peer)


def test_one_bit_scale_is_the_mean_magnitude() -> None:
    """Rastegari et al. 2016, eq. 6: alpha = |W|_1 / n."""
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.5, -0.5]])
    assert grids.choose_scale(weight, 1).tolist() == [2.0, 0.5]
