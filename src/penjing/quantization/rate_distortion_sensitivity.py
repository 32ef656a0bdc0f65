"""How much a change of each layer's weights changes what the network answers.

To second order a change E of a layer's weights moves the network's answer by a Kullback-Leibler
divergence of half the sum over its output rows of ``gain * e @ moments @ e``. ``moments`` are those
of the layer's input; ``gain`` makes the trace of that form the mean squared gradient of the
likelihood of an answer which the network itself would give, image by image.

Sources: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature", section 3; Tseng et al. 2025, "Model-preserving adaptive rounding", for gradients of whole
images. One gain for all rows of a group: rows of classes that the calibration images do not show
would else seem to be free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.layers import Layer, original, set_original
from penjing.progress import shown
from penjing.quantization import patches
from penjing.quantization.statistics import channel_statistics, evaluating, hooked

PATCHES = 64
"""Input patches an image that the moments are taken of, about."""
NOISE = 0.3
"""Damping for each column a patch: what few samples say of many columns is mostly chance."""
LEAST_DAMPING = 0.01
MOST_REFINED = math.log(5)
"""A measurement on few images is not believed beyond so much."""


@dataclass
class Sensitivity:
    """One layer's second-order information, in the groups of ``patches.matrix``.

    ``moments`` float32 ``[groups, K, K]``, damped; ``gain`` float32 ``[groups]``; ``bias_gain`` is
    the mean squared gradient of one bias.
    """

    moments: Tensor
    gain: Tensor
    bias_gain: float


def sensitivities(
    model: nn.Module, found: dict[str, Layer], batches: Sequence[Tensor], *, classifies: bool
) -> dict[str, Sensitivity]:
    """Sensitivity of those layers ``found`` that run, from ``batches`` float32 ``[N, C, H, W]``.

    ``classifies``: the output is logits; else every output counts alike.
    """
    moments, rows = _moments(model, found, batches)
    energy, bias_energy = _energies(model, {n: found[n] for n in moments}, batches, classifies)
    return {
        name: _sensitivity(moments[name], rows[name], energy[name], bias_energy[name], found[name])
        for name in moments
    }


def refined(
    model: nn.Module,
    found: dict[str, Layer],
    known: dict[str, Sensitivity],
    rounded: dict[str, Tensor],
    predicted: dict[str, float],
    images: Tensor,
    *,
    classifies: bool,
) -> dict[str, Sensitivity]:
    """``known`` with gains that fit what rounding each layer alone does to the network's answers.

    Second-order information of few images is too kind to layers with many columns and too harsh on
    others, by factors; measuring costs one pass a layer.

    Args:
        rounded: each layer's weight as it will be, shaped like the weight.
        predicted: each layer's divergence by ``known``.
        images: float32 ``[N, C, H, W]``; best none of those that ``known`` is from.
    """
    means: dict[str, Tensor] = {}

    def keep(name: str, layer: Layer, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        means[name] = channel_statistics(layer, output)[0]

    def correct(name: str, layer: Layer, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shift = means[name] - channel_statistics(layer, output)[0]
        channels = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
        return output + shift.reshape(-1, *[1] * (output.dim() - 1 - channels))

    with hooked(found, keep), evaluating(model):
        expected = model(images)
    factors: dict[str, Tensor] = {}
    for name in shown(known, "effect of each layer", len(known)):
        layer = found[name]
        former = original(layer).detach()
        set_original(layer, "weight", rounded[name])
        with hooked({name: layer}, correct), evaluating(model):
            measured = _divergence(model(images), expected, classifies)
        set_original(layer, "weight", former)
        ratio = measured / max(predicted[name], torch.finfo(torch.float32).tiny)
        factors[name] = ratio.clamp(1e-6, 1e6).log()
    sizes = torch.tensor([found[name].weight.numel() for name in factors], dtype=torch.float32)
    logs = torch.stack([factors[name].float().cpu() for name in factors])
    logs = (logs - (logs * sizes).sum() / sizes.sum()).clamp(-MOST_REFINED, MOST_REFINED)
    return {
        name: replace(known[name], gain=known[name].gain * float(log.exp()))
        for name, log in zip(factors, logs, strict=True)
    }


def _sensitivity(
    moments: Tensor, rows: int, energy: Tensor, bias_energy: float, layer: Layer
) -> Sensitivity:
    outputs = patches.matrix(layer, layer.weight).shape[1]
    columns = moments.shape[-1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(moments.dtype).tiny)
    damping = max(NOISE * columns / rows, LEAST_DAMPING)
    damped = moments + torch.diag_embed((damping * level).expand_as(diagonal))
    gain = energy / (outputs * columns * level[:, 0])
    return Sensitivity(damped, gain, bias_energy / len(layer.weight))


def _moments(
    model: nn.Module, found: dict[str, Layer], batches: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str, layer: Layer, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        seen = patches.rows(layer, inputs[0], PATCHES * len(inputs[0]))
        sums[name] = sums.get(name, 0) + seen.transpose(1, 2) @ seen  # type: ignore[assignment]
        rows[name] = rows.get(name, 0) + seen.shape[1]

    with hooked(found, watch), evaluating(model):
        for batch in shown(batches, "moments of the layers' inputs", len(batches)):
            model(batch.contiguous())
    return {name: total / rows[name] for name, total in sums.items()}, rows


def _energies(
    model: nn.Module, found: dict[str, Layer], batches: Sequence[Tensor], classifies: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Mean over the images of each group's squared gradient, and of the bias's."""
    generator = torch.Generator(batches[0].device).manual_seed(0)
    weights = {name: original(layer) for name, layer in found.items()}
    energy = {n: found[n].weight.new_zeros(_groups(found[n])) for n in found}
    bias_energy = dict.fromkeys(found, 0.0)
    biases = {name: layer.bias for name, layer in found.items() if layer.bias is not None}
    wanted = [*weights.values(), *biases.values()]
    images = [image for batch in batches for image in batch.split(1)]
    with evaluating(model), torch.enable_grad(), _differentiable(wanted):
        for image in shown(images, "sensitivity of the layers", len(images)):
            loss = _surprise(model(image.contiguous()), generator, classifies)
            gradients = torch.autograd.grad(loss, wanted)
            for name, gradient in zip(weights, gradients, strict=False):
                squared = patches.matrix(found[name], gradient).square().sum((1, 2))
                energy[name] += squared / len(images)
            for name, gradient in zip(biases, gradients[len(weights) :], strict=True):
                bias_energy[name] += float(gradient.square().sum()) / len(images)
    return energy, bias_energy


def _groups(layer: Layer) -> int:
    return len(patches.matrix(layer, layer.weight))


class _differentiable:  # noqa: N801
    """Let gradients flow to ``tensors`` for a while."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.former = [tensor.requires_grad for tensor in tensors]

    def __enter__(self) -> None:
        for tensor in self.tensors:
            tensor.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for tensor, former in zip(self.tensors, self.former, strict=True):
            tensor.requires_grad_(former)


def _divergence(output: Tensor, expected: Tensor, classifies: bool) -> Tensor:
    """Mean over the images, up to a constant factor."""
    if not classifies:
        return (output - expected).square().mean()
    likely = expected.log_softmax(-1)
    return (likely.exp() * (likely - output.log_softmax(-1))).sum(-1).mean()


def _surprise(output: Tensor, generator: torch.Generator, classifies: bool) -> Tensor:
    """A loss whose gradient, squared, is on average the Fisher information of the answer."""
    if not classifies:
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        return (output * noise).sum() / output.numel() ** 0.5
    logits = output.flatten(0, -2)
    answer = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, answer, reduction="sum")
