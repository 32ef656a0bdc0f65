"""Sensitivity: how much a change of each layer's weights changes the network's outputs.

To second order a change E of a layer's weights moves the network's outputs by a Kullback-Leibler
divergence of half the sum over its output rows of ``gain * e @ moments @ e``. ``moments`` are those
of the layer's input; ``gain`` makes the trace of that form the mean squared gradient of the
likelihood of an output drawn from the network's own distribution, image by image.

Sources: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature", section 3; Tseng et al. 2025, "Model-preserving adaptive rounding", for gradients of whole
images. One gain for all rows of a group: rows of classes that the calibration images do not show
would else seem to be free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.net import patches
from penjing.net.layers import Layer, original, set_original
from penjing.net.observation import channel_statistics, differentiable, hooked, per_channel
from penjing.progress import shown
from penjing.quantization.error_compensation import Elimination, eliminate
from penjing.tasks import outputs
from penjing.tasks.divergence import columns, of_scores
from penjing.tasks.outputs import evaluating

PATCHES = 64
"""Input patches an image that the moments are taken of, about."""
NOISE = 0.3
"""Damping for each column a patch: what few samples say of many columns is mostly chance."""
LEAST_DAMPING = 0.01
DEAD = 1e-6
"""Least level of a group, as a share of the mean level of all groups."""
MOST_REFINED = math.log(5)
"""A measurement on few images is not believed beyond so much."""


@dataclass
class Sensitivity:
    """One layer's second-order information, in the groups of ``patches.matrix``.

    ``moments`` float32 ``[groups, K, K]``, damped, and their ``elimination``; ``gain`` float32
    ``[groups]``; ``bias_gain`` is the mean squared gradient of one bias.
    """

    moments: Tensor
    elimination: Elimination
    gain: Tensor
    bias_gain: float

    @property
    def weight_gain(self) -> float:
        """Mean squared gradient of one weight whose change later ones make good, over all weights."""
        return float((self.gain[:, None] * self.elimination.remaining).mean())


def sensitivities(
    model: nn.Module, found: dict[str, Layer], batches: Sequence[Tensor], *, classifies: bool
) -> dict[str, Sensitivity]:
    """Return the sensitivity of the layers ``found`` that run, from ``batches`` float32 ``[N, C, H,
    W]``.

    ``classifies``: the output is logits; else every output counts alike.
    """
    wide = {name: layer for name, layer in found.items() if _outputs(layer) > 1}
    moments, rows = _moments(model, wide, batches)
    seen = _gradients(model, found, batches, classifies)
    known = {}
    for name, one in seen.items():
        if name in wide and name not in moments:
            continue  # Never called, or on inputs without a patch: it gets the finest grid.
        if name in wide:
            level = _level(moments[name])[:, 0]
            height, width = _outputs(wide[name]), moments[name].shape[-1]
            gain = one.energy / (height * width * level)
            damped = _damped(moments[name], NOISE * width / rows[name])
        else:
            gain = torch.ones_like(one.energy[:, 0, 0])
            damped = _damped(one.energy, NOISE * one.energy.shape[-1] / sum(map(len, batches)))
        bias_gain = one.bias_energy / len(found[name].weight)
        elimination = eliminate(damped, patches.coding_order(found[name]))
        known[name] = Sensitivity(damped, elimination, gain, bias_gain)
    return known


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
    """Return ``known`` with gains that fit what rounding each layer alone does to the outputs.

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
        return output + per_channel(layer, shift, output)

    if images.dim() == 4:  # what CPUs convolve fastest
        images = images.contiguous(memory_format=torch.channels_last)
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


def _damped(moments: Tensor, damping: float) -> Tensor:
    diagonal = moments.diagonal(dim1=1, dim2=2)
    added = max(damping, LEAST_DAMPING) * _level(moments)
    return moments + torch.diag_embed(added.expand_as(diagonal))


def _level(moments: Tensor) -> Tensor:
    """Return the mean of each group's diagonal ``[G, 1]``; a group whose input is always zero must stay
    invertible."""
    level = moments.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    return level.clamp_min(max(float(level.mean()) * DEAD, torch.finfo(moments.dtype).tiny))


def _moments(
    model: nn.Module, found: dict[str, Layer], batches: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str, layer: Layer, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        seen = patches.rows(layer, inputs[0], PATCHES * len(inputs[0]))
        if not seen.shape[1]:
            return
        sums[name] = sums.get(name, 0) + seen.transpose(1, 2) @ seen  # type: ignore[assignment]
        rows[name] = rows.get(name, 0) + seen.shape[1]

    with hooked(found, watch), evaluating(model):
        for batch in shown(batches, "moments of the layers' inputs", len(batches)):
            model(batch.contiguous())
    return {name: total / rows[name] for name, total in sums.items()}, rows


@dataclass
class _Gradients:
    """Means over the images: the sum of a group's squared gradients ``[G]``, or where a group has one
    output only, as in a depthwise convolution, their outer products ``[G, K, K]``, and the sum of
    the bias's squared ones."""

    energy: Tensor
    bias_energy: float = 0.0


def _gradients(
    model: nn.Module, found: dict[str, Layer], batches: Sequence[Tensor], classifies: bool
) -> dict[str, _Gradients]:
    """Return the gradients of the layers that run."""
    generator = torch.Generator(batches[0].device).manual_seed(0)
    weights = {name: original(layer) for name, layer in found.items()}
    biases = {name: layer.bias for name, layer in found.items() if layer.bias is not None}
    wanted = [*weights.values(), *biases.values()]
    images = [image for batch in batches for image in batch.split(1)]
    seen: dict[str, _Gradients] = {}
    with evaluating(model), differentiable(wanted):
        for image in shown(images, "sensitivity of the layers", len(images)):
            loss = _surprise(model(image.contiguous()), generator, classifies)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=False):
                if gradient is not None:
                    energy = _energy(found[name], gradient) / len(images)
                    seen.setdefault(name, _Gradients(torch.zeros_like(energy))).energy += energy
            for name, gradient in zip(biases, gradients[len(weights) :], strict=True):
                if gradient is not None:
                    seen[name].bias_energy += float(gradient.square().sum()) / len(images)
    return seen


def _energy(layer: Layer, gradient: Tensor) -> Tensor:
    rows = patches.matrix(layer, gradient)
    return rows.transpose(1, 2) @ rows if _outputs(layer) == 1 else rows.square().sum((1, 2))


def _outputs(layer: Layer) -> int:
    """Return the number of outputs of one group."""
    return patches.matrix(layer, layer.weight).shape[1]


def _divergence(output: Any, expected: Any, classifies: bool) -> Tensor:
    """Return the mean divergence over the images, up to a constant factor."""
    if classifies:
        return of_scores(outputs.logits(output), outputs.logits(expected)).mean()
    pairs = zip(_floats(output), _floats(expected), strict=True)
    return torch.stack([(one - other).square().mean() for one, other in pairs]).sum()


def _surprise(output: Any, generator: torch.Generator, classifies: bool) -> Tensor:
    """Return a loss whose squared gradient is on average the Fisher information of the output."""
    if not classifies:
        return torch.stack([_noisy(one, generator) for one in _floats(output)]).sum()
    logits = columns(outputs.logits(output))
    answer = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, answer, reduction="sum")


def _noisy(output: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    return (output * noise).sum() / output.numel() ** 0.5


def _floats(output: Any) -> list[Tensor]:
    return [one for one in outputs.tensors(output) if one.is_floating_point()]
