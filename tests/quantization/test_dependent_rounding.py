"""Rounding along the trellis against scalar rounding of the same bits, and exhaustive search."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from penjing.container import arithmetic, trellis
from penjing.container.contexts import coding_order
from penjing.quantization import dependent_rounding
from penjing.quantization.dependent_rounding import compensated
from penjing.quantization.error_compensation import eliminate


def in_coding_order(rows: int, columns: int) -> Tensor:
    return torch.from_numpy(coding_order((rows, columns, 1)))


def coded(values: Tensor) -> tuple[float, int]:
    """Bits an integer in the container's coder, and the form it finds them in."""
    symbols = (values.numpy().ravel().astype(np.int16) + 128).astype(np.uint8)
    data, _ = arithmetic.encode(symbols, (*values.shape, 1), 128, "weights", {})
    return 8 * len(data) / len(symbols), data[3]


@pytest.mark.parametrize(("law", "least"), [("normal", 0.75), ("laplace", 0.65)])
@pytest.mark.parametrize("step", [0.3, 0.6])
def test_it_gains_most_of_a_decibel_over_scalar_rounding(
    law: str, least: float, step: float
) -> None:
    """At 2 to 3 bits; the bound for any number of states is 1.53 (Marcellin & Fischer 1990 have 0.9
    to 1.1 for 8 states and uniform numbers)."""
    torch.manual_seed(0)
    x = (
        torch.randn(200, 512)
        if law == "normal"
        else torch.distributions.Laplace(0, 1).sample((200, 512))
    )
    known = eliminate(torch.eye(512)[None], in_coding_order(200, 512))
    values = compensated(x[None], known, step)[0]
    bits, form = coded(values)
    assert form == arithmetic.DEPENDENT
    low, high = 0.01, 10.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _entropy((x / middle).round()) > bits else (low, middle)
    scalar = ((x / middle).round() * middle - x).square().mean()
    error = (values * step - x).square().mean()
    assert least < 10 * math.log10(float(scalar / error)) < 1.53


def _entropy(values: Tensor) -> float:
    shares = values.unique(return_counts=True)[1] / values.numel()
    return float(-(shares * shares.log2()).sum())


def test_without_a_price_it_is_the_best_of_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependent_rounding, "RATE", 0.0)
    torch.manual_seed(0)
    x = 3 * torch.randn(6, 5)
    found = compensated(x[None], eliminate(torch.eye(5)[None], torch.arange(5)), 1.0)[0]
    for row, values in zip(x, found, strict=True):
        best = min(_error(row, parities) for parities in itertools.product((0, 1), repeat=5))
        assert float((values - row).square().sum()) == pytest.approx(best, rel=1e-5)


def _error(row: Tensor, parities: tuple[int, ...]) -> float:
    """Least squared error of a path, given by the parities of its indices."""
    state, error = 0, 0.0
    for wanted, parity in zip(row.tolist(), parities, strict=True):
        allowed = trellis.values_of(2 * (state & 1) + parity, -99, 99)
        error += float(np.abs(allowed - wanted).min() ** 2)
        state = trellis.step(state, parity)
    return error


def test_later_columns_make_good_what_earlier_ones_do() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(500, 64) @ torch.randn(64, 64)
    moments = (inputs.T @ inputs / 500)[None] + 0.01 * torch.eye(64)
    x, order = torch.randn(1, 40, 64), in_coding_order(40, 64)
    errors = []
    for known in (eliminate(moments, order), eliminate(torch.eye(64)[None], order)):
        difference = compensated(x, known, 0.3) * 0.3 - x
        errors.append(float(((difference @ moments) * difference).sum()))
    assert errors[0] < 0.6 * errors[1]


def test_zeros_stay_and_large_weights_fit_into_8_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 33)
    x[:, :, ::3] = 0
    x[0, 0, 1] = 500.0
    known = eliminate(torch.eye(33).repeat(2, 1, 1), torch.arange(33))
    values = compensated(x, known, 0.5)
    assert (values[x == 0] == 0).all()
    assert values.abs().max() <= 127
    assert torch.equal(values, values.round())
    assert trellis.obeyed(values.reshape(20, 33).numpy().astype(np.int16))
