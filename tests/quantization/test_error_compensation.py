import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.net import patches
from penjing.quantization import grids
from penjing.quantization.error_compensation import compensated, eliminate, output_error


def correlated_rows(count: int, columns: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, columns) @ torch.randn(columns, columns) + 0.5


@pytest.mark.parametrize(("bits", "share"), [(4, 0.6), (2, 0.8), (1, 0.9)])
def test_it_beats_plain_rounding_on_correlated_inputs(bits: int, share: float) -> None:
    rows, weight = correlated_rows(2000, 200), torch.randn(1, 32, 200)
    moments = (rows.T @ rows)[None]
    scale = grids.choose_scale(weight[0], bits)[None]
    found = compensated(weight, moments, scale, lambda steps: grids.to_codes(steps, bits))
    plain = grids.to_codes(weight / scale[..., None], bits) * scale[..., None]
    error = (rows @ (found - weight)[0].T).square().sum()
    assert error < share * (rows @ (plain - weight)[0].T).square().sum()
    codes = found / scale[..., None]
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 8, 40)
    scale = grids.choose_scale(weight[0], 4)[None]
    found = compensated(weight, torch.eye(40)[None], scale, lambda s: grids.to_codes(s, 4))
    torch.testing.assert_close(
        found, grids.to_codes(weight / scale[..., None], 4) * scale[..., None]
    )


def test_zeros_stay_and_groups_are_independent() -> None:
    rows = correlated_rows(500, 30)
    moments = torch.stack([rows.T @ rows, torch.eye(30)])
    weight = torch.randn(2, 8, 30)
    weight[:, :, ::3] = 0
    scale = torch.stack([grids.choose_scale(w, 4) for w in weight])
    found = compensated(weight, moments, scale, lambda steps: grids.to_codes(steps, 4))
    assert (found[:, :, ::3] == 0).all()
    alone = compensated(weight[:1], moments[:1], scale[:1], lambda s: grids.to_codes(s, 4))
    torch.testing.assert_close(found[:1], alone)


def test_output_error_is_that_of_the_outputs() -> None:
    rows, change = correlated_rows(100, 20), torch.randn(1, 3, 20)
    expected = (rows @ change[0].T).square().sum(0)
    torch.testing.assert_close(output_error(change, (rows.T @ rows)[None])[0], expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4, padding=(1, 0)),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Linear(4, 6),
    ],
    ids=str,
)
def test_rows_times_matrix_is_the_layer(layer: nn.Module) -> None:
    torch.manual_seed(0)
    shape = {nn.Conv1d: (2, 4, 9), nn.Linear: (2, 5, 4)}.get(type(layer), (2, 4, 9, 9))
    x = torch.randn(shape)
    rows = patches.rows(layer, x, 10**6)
    matrix = patches.matrix(layer, layer.weight)
    with torch.no_grad():
        product = torch.cat(list(rows @ matrix.transpose(1, 2)), dim=1)
        expected = layer(x) if isinstance(layer, nn.Linear) else layer(x).transpose(1, -1)
        expected = expected.flatten(0, -2) - layer.bias
    # The order of the patches is another one: compare the sets by their moments.
    torch.testing.assert_close(product.T @ product, expected.T @ expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(patches.from_matrix(layer, matrix, layer.weight.shape), layer.weight)


def test_very_wide_layers_are_cut_into_pieces() -> None:
    layer = nn.Linear(3 * patches.MAX_COLUMNS, 2)
    matrix = patches.matrix(layer, layer.weight)
    assert matrix.shape == (3, 2, patches.MAX_COLUMNS)
    assert torch.equal(patches.from_matrix(layer, matrix, layer.weight.shape), layer.weight)
    x = torch.randn(2, 3 * patches.MAX_COLUMNS)
    rows = patches.rows(layer, x, 100)
    total = torch.einsum("prk,pok->ro", rows, matrix)
    torch.testing.assert_close(total, F.linear(x, layer.weight), atol=1e-4, rtol=1e-4)


def test_what_remains_of_a_column_is_its_conditional_variance() -> None:
    rows = correlated_rows(500, 6).double()
    moments = (rows.T @ rows / 500)[None]
    found = eliminate(moments)
    order = found.order[0]
    for place in range(6):
        column, later = rows[:, order[place]], rows[:, order[place + 1 :]]
        fit = later @ torch.linalg.lstsq(later, column[:, None]).solution if later.numel() else 0.0
        left = (column - (fit[:, 0] if later.numel() else 0.0)).square().mean()
        torch.testing.assert_close(found.remaining[0, place], left)
