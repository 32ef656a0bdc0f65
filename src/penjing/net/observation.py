"""Statistics of every layer on calibration images: the range and second moments of its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penjing.errors import PenjingError
from penjing.net import patches
from penjing.net.layers import Layer
from penjing.tasks.outputs import evaluating

Observer = Literal["minmax", "percentile", "mse"]

SAMPLES = 1 << 18
"""Number of values kept of a layer's inputs, up to twice as many; the range is over all values."""
ROWS = 8192
"""Number of patches from which a layer's second moments are computed."""


@dataclass
class LayerStatistics:
    """Statistics of one layer's inputs and outputs over the calibration images.

    ``moments`` is the sum of outer products of the input patches, float32 ``[groups, K, K]`` (see
    ``patches.rows``), or None when not asked for; ``output_means`` and ``output_deviations`` are
    the mean and the standard deviation of every output channel on the first batch, float32
    ``[out]``; ``calls`` is how often the layer runs on one image.
    """

    low: float = 0.0
    high: float = 0.0
    samples: list[Tensor] = field(default_factory=list)
    moments: Tensor | None = None
    output_means: Tensor | None = None
    output_deviations: Tensor | None = None
    calls: int = 0

    def range(self, observer: Observer, bits: int) -> tuple[float, float]:
        """Return the range to quantize the layer's input in: of all values (``minmax``), without 1 in
        10,000 at either end (``percentile``), or of the least squared error (``mse``)."""
        if observer == "minmax":
            return self.low, self.high
        samples = torch.cat(self.samples)
        if observer == "percentile":
            tails = torch.quantile(samples, torch.tensor([1e-4, 1 - 1e-4]))
            return float(tails[0]), float(tails[1])
        return _least_squares(samples, self.low, self.high, bits)


def collect(
    model: nn.Module,
    layers: dict[str, Layer],
    batches: Sequence[Tensor],
    *,
    moments: bool,
) -> dict[str, LayerStatistics]:
    """Run ``batches`` (float32 ``[N, C, H, W]``) through ``model``, and return statistics of the
    layers that ran, in that order.

    Raises ``PenjingError`` when a layer's input holds NaN or infinity.
    """
    found: dict[str, LayerStatistics] = {}

    def watch(name: str, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        statistics = found.setdefault(name, LayerStatistics())
        _observe(statistics, name, inputs[0], len(batches))
        if moments:
            _accumulate(statistics, layer, inputs[0], len(batches))
        if batch is batches[0]:
            statistics.calls += 1
            means, deviations = channel_statistics(layer, output)
            statistics.output_means, statistics.output_deviations = means, deviations

    with hooked(layers, watch), evaluating(model):
        for batch in batches:
            model(batch.contiguous())
    return found


def channel_statistics(layer: Layer, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of every channel of the ``output`` of ``layer``,
    float ``[out]`` each."""
    channels = channel_axis(layer, output)
    others = [axis for axis in range(output.dim()) if axis != channels]
    deviations, means = torch.std_mean(output, others, correction=0)
    return means, deviations


def channel_axis(layer: Layer, output: Tensor) -> int:
    """Return the channel axis of the ``output`` of ``layer``."""
    return output.dim() - 1 if isinstance(layer, nn.Linear) else 1


def per_channel(layer: Layer, values: Tensor, output: Tensor) -> Tensor:
    """Reshape ``values`` ``[out]`` to broadcast over the ``output`` of ``layer``."""
    return values.reshape(-1, *[1] * (output.dim() - 1 - channel_axis(layer, output)))


@contextmanager
def hooked(layers: Mapping[str, nn.Module], watch: Callable) -> Iterator[None]:
    """Call ``watch(name, layer, inputs, output)`` after each layer until the block ends; if it returns
    a value, that replaces the output. ``inputs`` are those by position, then those by keyword.

    Calls without images, and those whose first input or output is no tensor, are skipped.
    """

    def hook(name: str) -> Callable:
        def call(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            inputs = (*args, *kwargs.values())
            tensors = inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            return watch(name, layer, inputs, output) if tensors and inputs[0].numel() else None

        return call

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(hook(name), with_kwargs=True))
        yield


@contextmanager
def differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients flow to ``tensors`` until the block ends, also inside ``evaluating``."""
    former = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        for tensor, _ in former:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor, required in former:
            tensor.requires_grad_(required)


def _observe(statistics: LayerStatistics, name: str, x: Tensor, batches: int) -> None:
    low, high = (float(end) for end in x.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise PenjingError(
            f"the input of layer {name} has NaN or infinite values on the calibration images; check "
            "the model's weights and the preprocessing before quantizing."
        )
    statistics.low = min(statistics.low, low)
    statistics.high = max(statistics.high, high)
    flat = x.detach().flatten()
    # An odd stride does not sample the same column or channel again and again.
    stride = max(1, flat.numel() * batches // SAMPLES) | 1
    statistics.samples.append(flat[::stride].clone())
    if sum(map(len, statistics.samples)) > 2 * SAMPLES:  # a layer that runs many times
        statistics.samples[:] = [torch.cat(statistics.samples)[::2].clone()]


def _accumulate(statistics: LayerStatistics, layer: Layer, x: Tensor, batches: int) -> None:
    rows = patches.rows(layer, x, max(1, ROWS // batches))
    product = rows.transpose(1, 2) @ rows
    statistics.moments = product if statistics.moments is None else statistics.moments + product


def _least_squares(samples: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    best, least = (low, high), torch.inf
    errors = torch.empty_like(samples)
    for factor in torch.linspace(0.2, 1.0, 81).tolist():
        scale = max((high - low) * factor / (2**bits - 1), 1e-12)
        zero = round(-low * factor / scale)
        torch.div(samples, scale, out=errors).round_().clamp_(-zero, 2**bits - 1 - zero)
        error = float(errors.mul_(scale).sub_(samples).square_().mean())
        if error < least:
            best, least = (low * factor, high * factor), error
    return best
