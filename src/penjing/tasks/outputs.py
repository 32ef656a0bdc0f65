"""Model outputs in any form: one tensor, or tensors in dicts, tuples and lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from penjing.errors import PenjingError

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference of two outputs that counts as rounding, relative to the largest output."""


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors in ``output``, in the order in which ``torch.export`` numbers them.

    Other values (None, numbers, strings) are left out.

    Raises:
        PenjingError: there is no tensor in it.
    """
    found = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    if not found:
        raise PenjingError(
            f"the model returns no tensor, but {type(output).__name__}; expected a tensor, or a "
            "dict, tuple or list of tensors: change what its forward returns."
        )
    return found


def like(output: Any, values: Sequence[Tensor]) -> Any:
    """Put ``values`` into the form of ``output``, in the places of ``tensors(output)``.

    Raises:
        PenjingError: their number differs.
    """
    leaves, form = tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(places) != len(values):
        raise PenjingError(
            f"{len(values)} outputs were found, expected the {len(places)} that the model returns."
        )
    for place, value in zip(places, values, strict=True):
        leaves[place] = value
    return tree_unflatten(leaves, form)


def concatenated(outputs: Sequence[Any]) -> Any:
    """Join the ``outputs`` of several batches into one, in the form of the first.

    Tensors are concatenated along axis 0; those without axes, one number a batch, are stacked.
    """
    columns = zip(*(tensors(output) for output in outputs), strict=True)
    joined = [torch.cat(c) if c[0].dim() else torch.stack(c) for c in columns]
    return like(outputs[0], joined)


def logits(output: Any) -> Tensor:
    """Return the logits of a classifier: the first tensor of ``output``.

    Nets with auxiliary heads (GoogLeNet, Inception) return them first, in training too.
    """
    return tensors(output)[0]


def as_floats(output: Any) -> Any:
    """Convert every floating-point tensor of ``output`` to float32, for losses after autocast."""
    found = tensors(output)
    return like(output, [t.float() if t.is_floating_point() else t for t in found])


def same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether two outputs agree in their shapes and, within ``TOLERANCE``, in their values.

    NaN differs from everything; infinity equals itself.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return False
    return all(_close(a, b) for a, b in zip(expected, found, strict=True) if a.numel())


def _close(expected: Tensor, found: Tensor) -> bool:
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    bound = TOLERANCE.get(expected.dtype, 1e-2) * largest
    return bool(((expected == found) | ((expected - found).abs() <= bound)).all())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode without gradients; restore each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
