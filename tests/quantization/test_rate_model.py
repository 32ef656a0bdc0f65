import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penjing.quantization import rate_distortion, rate_model
from penjing.quantization.rate_distortion import GridWeights


def laplace(shape: tuple[int, int, int], spread: float, seed: int = 0) -> torch.Tensor:
    """Weights in steps whose rows and channels are of different size."""
    rng = np.random.default_rng(seed)
    rows, channels = (np.exp(rng.normal(0, 0.7, n)) for n in shape[:2])
    scale = spread * rows[:, None, None] * channels[None, :, None]
    return torch.tensor(rng.laplace(0, scale, shape), dtype=torch.float32).clamp(-127, 127)


@pytest.mark.parametrize("shape", [(300, 784, 1), (64, 64, 9), (50, 20, 25)])
@pytest.mark.parametrize("spread", [0.03, 0.3, 3.0])
def test_it_is_what_the_containers_coder_spends(shape: tuple, spread: float) -> None:
    steps = laplace(shape, spread)
    _, whole = rate_model.bits(steps)
    coded = 8 * rate_distortion.coded_bytes([GridWeights(steps.round(), 1.0, 8)])
    learning = 400  # a stream's head, and what histograms cost that have not seen much
    assert 0.9 * coded - learning < whole < 1.05 * coded


@pytest.mark.parametrize("shape", [(20, 30, 1), (8, 8, 9)])
def test_its_gradient_is_the_slope_between_two_integers(shape: tuple) -> None:
    steps = laplace(shape, 1.0)
    steps = steps.floor() + 0.1 + 0.2 * (steps - steps.floor())  # away from where the slope breaks
    steps.requires_grad_(True)
    spent, _ = rate_model.bits(steps)
    (gradient,) = torch.autograd.grad(spent, steps)
    before = float(spent.detach())
    for at in [(0, 0, 0), (3, 5, 0), (7, 7, shape[2] - 1)]:
        moved = steps.detach().clone()
        moved[at] += 0.05
        slope = (float(rate_model.bits(moved)[0]) - before) / 0.05
        assert float(gradient[at]) == pytest.approx(slope, rel=0.02, abs=0.02)


@given(st.integers(0, 2**32), st.floats(0.01, 10))
def test_larger_weights_never_cost_less(seed: int, spread: float) -> None:
    steps = laplace((6, 5, 4), spread, seed).requires_grad_(True)
    spent, whole = rate_model.bits(steps)
    (gradient,) = torch.autograd.grad(spent, steps)
    assert (gradient * steps.sign() >= 0).all()
    assert whole >= 0 and torch.isfinite(gradient).all()


def test_integers_cost_what_they_are_rounded_to() -> None:
    steps = laplace((40, 30, 1), 1.0).round()
    spent, whole = rate_model.bits(steps)
    assert float(spent) == pytest.approx(whole, rel=1e-5)


def test_the_first_step_away_from_zero_is_dearer_where_all_else_is_zero() -> None:
    steps = torch.zeros(40, 40, 1)
    steps[:20, :20, 0] = laplace((20, 20, 1), 2.0)[..., 0]
    steps[0, 0] = steps[39, 39] = 0.4
    steps.requires_grad_(True)
    (gradient,) = torch.autograd.grad(rate_model.bits(steps)[0], steps)
    assert gradient[39, 39] > gradient[0, 0] + 2


def test_a_tensor_of_zeros_is_nearly_free() -> None:
    _, whole = rate_model.bits(torch.zeros(100, 100, 9))
    assert 0 <= whole < 100
