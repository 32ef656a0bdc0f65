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
NEAR = 16
"""Columns after which the changes of all eight paths are carried to the rest of the block together."""
LARGEST = tuple(int(values_of(one, 0, 127).max()) for one in range(SETS))
"""Largest integer of 8 bits in each of the trellis's sets."""
RATE = 0.1
"""Price of a bit, in squared steps of the two grids together. The best for one layer is 2 ln 2
times the error, a third; but that shrinks all layers alike, and what they do adds up."""
_LEAST_SPREAD = 0.25


def _into() -> tuple[Tensor, Tensor]:
    """Return the two states from which each state is reached, and the parity that leads there."""
    steps = [(step(state, parity), state, parity) for state in range(STATES) for parity in (0, 1)]
    steps.sort()
    states, parities = (torch.tensor([one[at] for one in steps]).reshape(-1, 2) for at in (1, 2))
    return states, parities


_FROM, _BY = _into()


def _by_state(grids: list[list[float]]) -> Tensor:
    """Return, for each state, whose lowest bit is its grid, what that grid has for each parity:
    ``[8, 2]``."""
    return torch.tensor(grids).repeat(STATES // 2, 1)


_REST = _by_state([[0.0, 2.0], [-1.0, 1.0]])
_LEAST = _by_state([[0.0, 2.0], [3.0, 1.0]])
_LARGEST = _by_state([[float(LARGEST[2 * grid + parity]) for parity in (0, 1)] for grid in (0, 1)])
_ODD_GRID = _by_state([[0.0, 0.0], [1.0, 1.0]]) > 0


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

    def bits(self, sizes: Tensor) -> Tensor:
        """Return the bits of absolute values ``[G, R, 8, 2]``, by the grid of their state."""
        bits = self.more[..., None] + self.slope[..., None] * sizes
        bits = torch.where((sizes == 1) & _ODD_GRID.to(sizes.device), self.one[..., None], bits)
        return torch.where(sizes == 0, self.zero.repeat(1, 1, STATES // 2)[..., None], bits)


def compensated(weight: Tensor, elimination: Elimination, scale: float) -> Tensor:
    """Return integers that follow the trellis along the columns of ``weight``, in the order of
    ``elimination``.

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
    """Find the best path through the columns of a block from ``state`` ``[G, R, 1]``: its integers,
    and the state it ends in. ``moved`` are the ``steps`` with what earlier blocks did to them."""
    width, paths = steps.shape[2], (*steps.shape[:2], STATES)
    rest = moved[:, :, None].expand(*paths, width).contiguous()
    cost = steps.new_full(paths, math.inf).scatter_(2, state, 0.0)
    origins, values, into = [], [], (_FROM.to(steps.device), (_FROM * 2 + _BY).to(steps.device))
    for start in range(0, width, NEAR):
        stop = min(start + NEAR, width)
        # What each path has changed in the columns up to here, and has of those that follow.
        near = rest[..., start:stop]
        first = torch.arange(STATES, device=steps.device).expand(paths)
        for at in range(start, stop):
            mine = near[..., at - start]
            found, paid = _candidates(mine, keep[:, :, at, None], worth[..., at], price)
            total = (cost[..., None] + paid).flatten(2)[..., into[1].flatten()]
            cost, second = total.unflatten(2, (-1, 2)).min(3)
            origin = torch.where(second == 0, into[0][:, 0], into[0][:, 1])
            chosen = torch.where(second == 0, into[1][:, 0], into[1][:, 1])
            value = found.flatten(2).gather(2, chosen)
            change = steps[:, :, at, None] - value
            origins.append(origin)
            values.append(value)
            first = first.gather(2, origin)
            near = near.gather(2, origin[..., None].expand(near.shape))
            near[..., at - start] = change
            near[..., at - start + 1 :] += (
                change[..., None] * factor[:, None, None, at, at + 1 : stop]
            )
        if stop < width:
            later = rest[..., stop:].gather(2, first[..., None].expand(*paths, width - stop))
            rest[..., stop:] = later + near @ factor[:, None, start:stop, stop:]
    end = state = cost.argmin(2, keepdim=True)
    best = torch.empty_like(steps)
    for at in reversed(range(width)):
        best[:, :, at] = values[at].gather(2, state)[..., 0]
        state = origins[at].gather(2, state)
    return best, end


def _candidates(
    column: Tensor, keep: Tensor, worth: Tensor, price: _Price
) -> tuple[Tensor, Tensor]:
    """Return the best integer of each parity for what each path has of a column ``[G, R, 8]``, and its
    cost: both ``[G, R, 8, 2]``."""
    sizes, signs = column.abs()[..., None], torch.where(column < 0, -1.0, 1.0)[..., None]
    near = (sizes - RATE / 2 * (price.slope / worth)[..., None]).clamp_min(0)
    value = _nearest(near)
    paid = RATE * price.bits(value) + worth[..., None] * (sizes - value) ** 2
    keep = keep[..., None]
    return torch.where(keep, value * signs, 0.0), torch.where(keep, paid, _odd_at_zero(column))


def _odd_at_zero(column: Tensor) -> Tensor:
    """Return the cost of a zero that must stay zero, which has even parity."""
    return column.new_tensor([0.0, math.inf])


def _nearest(near: Tensor) -> Tensor:
    """Return the absolute values next to ``near`` ``[G, R, 8, 1]`` that a state allows: of even
    index, and of odd.

    They are multiples of 4 plus a remainder; on the odd grid, zero stands beside 3, 7, ...
    """
    rest, least, largest = (table.to(near.device) for table in (_REST, _LEAST, _LARGEST))
    value = (4 * ((near - rest) / 4).round() + rest).clamp_min(least)
    zero = (near < 1.5) & (rest == -1)
    return torch.where(zero, 0.0, value).minimum(largest)
