"""Rounding along the trellis: each weight on one of two grids, later ones make good earlier errors.

The best of all allowed paths is looked for row by row, its cost being the output error and the bits
that the integers should take. Each of the eight survivors carries what its own errors have done to
the rest of the row.

Sources: Viterbi 1967, "Error bounds for convolutional codes"; Marcellin & Fischer 1990, "Trellis coded
quantization"; Fischer & Wang 1992, "Entropy-constrained trellis-coded quantization"; Frantar et al.
2023, "GPTQ", for what errors do to the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.container.trellis import SETS, STATES, step, values_of
from penjing.quantization.error_compensation import Elimination

BLOCK = 128
"""Columns after which the best path is taken for good."""
LARGEST = tuple(int(values_of(one, 0, 127).max()) for one in range(SETS))
"""Of each of the trellis's sets, in 8 bits."""
RATE = 0.1
"""What a bit may cost, in squared steps of the two grids together. The best for one layer is 2 ln 2
times the error, a third; but that shrinks all layers alike, and what they do adds up."""
_LEAST_SPREAD = 0.25


def _into() -> tuple[Tensor, Tensor]:
    """For each state, the two it is reached from, and the parity that leads from each."""
    steps = [(step(state, parity), state, parity) for state in range(STATES) for parity in (0, 1)]
    steps.sort()
    states, parities = (torch.tensor([one[at] for one in steps]).reshape(-1, 2) for at in (1, 2))
    return states, parities


_FROM, _BY = _into()


@dataclass(frozen=True)
class _Price:
    """Bits of integers if the weights of a row follow Laplace's law with the mean absolute value that
    they have: of a zero and of a one on either grid, of others, and of each step away from zero.
    Each float32 ``[G, R, 1]``, ``zero`` with a last dimension for the grid."""

    slope: Tensor
    zero: Tensor
    one: Tensor
    more: Tensor

    @classmethod
    def of(cls, steps: Tensor) -> _Price:
        spread = steps.abs().mean(2, keepdim=True).clamp_min(_LEAST_SPREAD)
        slope = math.log2(math.e) / spread

        def log(width: float) -> Tensor:
            return torch.log2(-torch.expm1(-width / spread))

        zero = torch.cat([-log(1.0), -log(0.5)], 2)
        return cls(slope, zero, slope / 2 + 1 - log(1.5), 1 - slope - log(2.0))

    def bits(self, sizes: Tensor, grid: int) -> Tensor:
        """Of absolute values ``[G, R, S]`` on ``grid``."""
        bits = self.more + self.slope * sizes
        if grid:
            bits = torch.where(sizes == 1, self.one, bits)
        return torch.where(sizes == 0, self.zero[..., grid : grid + 1], bits)


def compensated(weight: Tensor, elimination: Elimination, scale: float) -> Tensor:
    """Integers that follow the trellis along the columns of ``weight``, in the order of ``elimination``.

    Args:
        weight: float32 ``[G, R, K]``: G independent matrices. Exact zeros stay zero.
        elimination: of the moments of the inputs, damped.
        scale: of the integers: half of what separates neighbours on one grid.

    Returns:
        Whole numbers of at most 8 bits, float32 ``[G, R, K]``.
    """
    columns = elimination.order[:, None, :].expand_as(weight)
    steps = weight.gather(2, columns) / scale
    rounded = _sweep(steps, elimination)
    return torch.empty_like(weight).scatter_(2, columns, rounded)


def _sweep(steps: Tensor, known: Elimination) -> Tensor:
    rest, keep, price = steps.clone(), steps != 0, _Price.of(steps)
    # In squared steps of a weight whose error costs as much as the mean.
    worth = (known.remaining / known.remaining.mean())[:, None, None, :]
    result = torch.empty_like(rest)
    state = torch.zeros(*steps.shape[:2], 1, dtype=torch.long, device=steps.device)
    for start in range(0, steps.shape[2], BLOCK):
        end = min(start + BLOCK, steps.shape[2])
        inside = known.factor[:, start:end, start:end].transpose(1, 2)
        now = slice(start, end)
        block = steps[:, :, now], rest[:, :, now], keep[:, :, now], worth[..., now]
        result[:, :, now], state = _block(*block, inside, price, state)
        changes = steps[:, :, now] - result[:, :, now]
        rest[:, :, end:] += changes @ known.factor[:, end:, now].transpose(1, 2)
    return result


def _block(
    steps: Tensor,
    moved: Tensor,
    keep: Tensor,
    worth: Tensor,
    factor: Tensor,
    price: _Price,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best path through the columns of a block from ``state`` ``[G, R, 1]``: its integers, and the
    state it ends in. ``moved`` are the ``steps`` with what earlier blocks did to them."""
    width, paths = steps.shape[2], (*steps.shape[:2], STATES)
    rest = moved[:, :, None].expand(*paths, width).contiguous()
    cost = steps.new_full(paths, math.inf).scatter_(2, state, 0.0)
    origins, values, into = [], [], (_FROM.to(steps.device), (_FROM * 2 + _BY).to(steps.device))
    for at in range(width):
        found, paid = _candidates(rest[..., at], keep[:, :, at, None], worth[..., at], price)
        total = (cost[..., None] + paid).flatten(2)[..., into[1].flatten()].unflatten(2, (-1, 2))
        cost, second = total.min(3)
        origin = torch.where(second == 0, into[0][:, 0], into[0][:, 1])
        chosen = torch.where(second == 0, into[1][:, 0], into[1][:, 1])
        value = found.flatten(2).gather(2, chosen)
        change = steps[:, :, at, None] - value
        origins.append(origin)
        values.append(value)
        later = rest[..., at + 1 :].gather(2, origin[..., None].expand(*paths, width - at - 1))
        rest[..., at + 1 :] = later + change[..., None] * factor[:, None, None, at, at + 1 :]
    end = state = cost.argmin(2, keepdim=True)
    best = torch.empty_like(steps)
    for at in reversed(range(width)):
        best[:, :, at] = values[at].gather(2, state)[..., 0]
        state = origins[at].gather(2, state)
    return best, end


def _candidates(
    column: Tensor, keep: Tensor, worth: Tensor, price: _Price
) -> tuple[Tensor, Tensor]:
    """The best integer of either parity for what each path has of a column ``[G, R, 8]``, and its
    cost: both ``[G, R, 8, 2]``."""
    sizes, signs = column.abs(), torch.where(column < 0, -1.0, 1.0)
    near = (sizes - RATE / 2 * price.slope / worth).clamp_min(0)
    found, paid = column.new_empty(*column.shape, 2), column.new_empty(*column.shape, 2)
    for grid in (0, 1):
        lane = slice(grid, None, 2)  # the lowest bit of a state is its grid
        for parity, value in enumerate(_nearest(near[..., lane], grid)):
            value = value.clamp_max(LARGEST[2 * grid + parity])
            bits = RATE * price.bits(value, grid)
            paid[..., lane, parity] = worth * (sizes[..., lane] - value) ** 2 + bits
            found[..., lane, parity] = value * signs[..., lane]
    odd_at_zero = torch.zeros_like(paid)
    odd_at_zero[..., 1] = math.inf
    return (
        torch.where(keep[..., None], found, 0.0),
        torch.where(keep[..., None], paid, odd_at_zero),
    )


def _nearest(near: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Absolute values on ``grid`` next to ``near``: of even index, and of odd."""
    if grid == 0:
        return 4 * (near / 4).round(), 4 * ((near - 2) / 4).round().clamp_min(0) + 2
    even = (4 * ((near + 1) / 4).round() - 1).clamp_min(3)
    return torch.where(near < 1.5, 0.0, even), 4 * ((near - 1) / 4).round().clamp_min(0) + 1
