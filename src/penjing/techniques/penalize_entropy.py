"""The smallest file, with training: what the weights cost in the file is part of the loss."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.container import arithmetic
from penjing.errors import PenjingError
from penjing.net import channels, dead_channels, layers
from penjing.net.channels import Group
from penjing.net.layers import IntegerWeights, Layer
from penjing.net.norms import fold_batch_norm
from penjing.quantization import grids, rate_distortion, rate_model
from penjing.quantization.rate_distortion import GridWeights
from penjing.targets.target import STANDARD, FileSize, Target
from penjing.tasks import Task
from penjing.techniques.technique import Attached, Kind, Technique

BITS = 8
FINE = 0.25
"""The first step, in root mean squares of the layer's weights: about 4 bits a weight."""
ROOM = 100
"""Number of steps to the largest weight, at most, when training starts."""
QUICK = 5.0
"""Learning rate of the steps' logarithms, as a multiple of that of weights."""
RAMP_END = 0.65
"""Share of the training after which the weights are to have nearly their size; the rest is for the
score."""
SLACK = 0.12
"""Octaves by which weights may be larger at the end of the ramp: weights settle as the learning
rate falls, and what has become zero hardly comes back."""
AIM = 0.99
"""Share of the size that training aims at, so that next to nothing is left to cut."""
LOOKS = (RAMP_END, 0.8, 0.9, 0.95)
"""Shares of the training after which the bytes that are not weights are estimated anew."""
START, STRONGEST = -7.0, 10.0
"""Octaves of strength: the first, and the most."""
INTEGRAL, PROPORTIONAL = 80.0, 4.0
"""Octaves of strength for each octave of size that is too much: added over the whole training, and at
once."""
AT_SIZE = 3.0
"""Factor of the excess after the ramp, where the strength hardly moves the size any more."""
COUNT_EVERY = 50
"""Steps between two codings with the real coder."""
FILES, HALVINGS = 8, 12
CLEARLY = 0.97
"""Ratio of bits below which a matrix is seen in eights: changing views is worse than a few per cent."""
BIAS_BITS = 7
"""Bits, with the sign, of the integers that biases and the channels' scales become."""
SCALE_BITS = 8
"""Bits, with the sign, of a scale that all channels share."""
SMALLEST = 8
"""Integer of a channel's scale, at least: a smaller one would be rounded by more than a sixteenth."""


Codes = dict[Layer, tuple[Tensor, float]]
"""Integers and step of each layer."""


class PenalizeEntropy(Technique):
    """Train towards a ``.penjing`` file of a given size.

    Weights are rounded to one integer grid a layer whose step learns; the loss holds what the
    integers cost in the container's coder, so that weights that matter little become zero, steps
    become coarse, and channels go whole: one that has lost its weights loses its bias too, and is cut
    at the end. The penalty's strength follows the size. Batch norms stay what they are until the end,
    and are then folded as they ran in training: on images without the training's shifts they would
    expect something else. Activations stay in float.
    """

    name: ClassVar[str] = "penalize_entropy"
    kind: ClassVar[Kind] = Kind.CODED
    leaves_dead_channels: ClassVar[bool] = True
    needs_training: ClassVar[str | None] = "compress_weights finds a small file without it"

    max_bytes: int | None = Field(default=None, ge=1)
    """Largest size of the ``.penjing`` file."""
    times_smaller: float | None = Field(default=None, gt=1)
    """Size of the file as a fraction of the model's float32 parameters, as they are when it is
    attached."""

    @model_validator(mode="after")
    def _one_size(self) -> PenalizeEntropy:
        if (self.max_bytes is None) == (self.times_smaller is None):
            raise ValueError("give either max_bytes (such as 40000) or times_smaller (such as 20)")
        return self

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> PenalizedEntropy:
        """Put fine grids on the weights and see how much room the rest of the file leaves them.

        Raises ``PenjingError`` for NaN or infinity in a layer's weights, and for a size that leaves
        no room.
        """
        whole = sum(4 * parameter.numel() for parameter in model.parameters())
        most = self.max_bytes or int(whole / (self.times_smaller or 1.0))
        device = next(model.parameters()).device
        pressure = Pressure().to(device)
        found = layers.compressible(model)
        layers.check_finite(found)
        groups = channels.groups(model, task.example.to(device))
        links: dict[Layer, LearnedGrid] = {}
        for layer in found.values():
            grid = LearnedGrid(_first_step(layer.weight.detach()), pressure).to(device)
            parametrize.register_parametrization(layer, "weight", grid, unsafe=True)
            links[layer] = grid
        sizes = FileSize(target, task.example)
        attached = PenalizedEntropy(self, links, groups, pressure, sizes, most)
        rest = attached.rest(model)
        if pressure.wanted <= 0:
            raise PenjingError(
                f"a file of {most} bytes is too small: {rest} bytes of it would not be weights; "
                "allow a larger file or prune channels first."
            )
        return attached


@dataclass(eq=False)
class PenalizedEntropy(Attached):
    """Weights on grids that learn, and the penalty on what they cost.

    Attributes:
        grids: what rounds the weights of each layer.
        groups: channels that go together.
        pressure: how strong the penalty is.
        sizes: how large the ``.penjing`` file is.
        most: its largest size in bytes.
        spent: bits that the model of the coder gives the weights as they last were.
    """

    grids: dict[Layer, LearnedGrid]
    groups: list[Group]
    pressure: Pressure
    sizes: FileSize
    most: int
    spent: float = 0.0

    def penalty(self) -> Tensor:
        """Return the strength times the mean bits of a weight, as the weights last were."""
        steps = [grid.steps for grid in self.grids.values() if grid.steps is not None]
        for grid in self.grids.values():
            grid.steps = None  # the graph behind it ends with this step
        spent = [_bits(one) for one in steps]
        self.spent = sum(whole for _, whole in spent)
        number = sum(one.numel() for one in steps)
        return self.pressure.strength / number * torch.stack([bits for bits, _ in spent]).sum()

    def step(self, model: nn.Module, progress: float) -> None:
        """Strengthen or weaken the penalty by how far the size is from what it should be by now."""
        if not self.spent:  # nothing has run yet
            return
        for grid in self.grids.values():
            grid.keep_coarse()
        pressure = self.pressure
        if int(pressure.steps) % COUNT_EVERY == 0:
            pressure.honest.fill_(8 * _coded(self._codes(0.0)) / self.spent)
            dead_channels.zero_constant(model, self.groups)
        if any(float(pressure.progress) < look <= progress for look in LOOKS):
            self.rest(model)
        now = math.log2(float(pressure.honest) * self.spent)
        if not pressure.steps:
            pressure.first.fill_(now)
        first, last = float(pressure.first), math.log2(max(float(pressure.wanted), 1.0))
        settled = max(progress - RAMP_END, 0.0) / (1 - RAMP_END)
        ramp = (last + SLACK - first) * min(progress / RAMP_END, 1.0) - SLACK * settled
        excess = now - first - ramp
        pressure.steps += 1
        passed = progress - float(pressure.progress)
        excess *= AT_SIZE if progress > RAMP_END else 1.0
        pressure.octaves.add_(INTEGRAL * passed * excess).clamp_(max=STRONGEST)
        pressure.progress.fill_(progress)
        octaves = float(pressure.octaves) + PROPORTIONAL * excess
        pressure.strength.fill_(2.0 ** min(octaves, STRONGEST))

    def bake(self, model: nn.Module) -> None:
        """Cut what is still too much, fold norms; scales and biases get few bits.

        Cut are weights that were rounded away from zero by least; and when training was too short for
        the size, more than those.
        """
        cut, spare = 0.0, 0
        for _ in range(FILES):
            codes = self._codes(cut)
            fits, size = self.sizes.at_most(self._finished(model, codes), self.most)
            if fits:
                break
            excess = size - self.most
            cut = self._cut(cut, _coded(codes) - excess - spare)
            spare += self.most // 500
        else:
            raise PenjingError(
                f"no weights were found with which the file has {self.most} bytes, the last has "
                f"{size}; train for more epochs or allow a larger file."
            )
        self._finish(model, codes)

    def rest(self, model: nn.Module) -> int:
        """Return the bytes of the file that are not weights; those left for weights become wanted."""
        codes = self._codes(0.0)
        rest = self.sizes.estimated(self._finished(model, codes)) - _coded(codes)
        self.pressure.wanted.fill_(8 * AIM * (self.most - rest))
        return rest

    def _cut(self, low: float, most: int) -> float:
        """Find what is to be cut, ``low`` at least, for integers that take ``most`` bytes."""
        for high in (0.5, 2.0, float(rate_model.LARGEST)):
            if _coded(self._codes(high)) <= most:
                break
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if _coded(self._codes(middle)) > most else (low, middle)
        return high

    def _codes(self, cut: float) -> Codes:
        """Return each layer's integers and step; up to ``cut`` steps more than a half go towards
        zero."""
        codes = {}
        for layer, grid in self.grids.items():
            with torch.no_grad():
                steps = _before(layer, grid) / grid.step()
            sizes = (steps.abs() + 0.5 - cut).floor().clamp(0, rate_model.LARGEST)
            codes[layer] = steps.sign() * sizes, float(grid.step().detach())
        return codes

    def _finished(self, model: nn.Module, codes: Codes) -> nn.Module:
        """Return the model that ``model`` becomes with these ``codes``."""
        names = {layer: name for name, layer in layers.compressible(model).items()}
        finished = copy.deepcopy(model)
        for module in finished.modules():
            layers.unparametrize(module)
        found = layers.compressible(finished)
        of_copy = {}
        for layer, (integers, step) in codes.items():
            same = found[names[layer]]
            of_copy[same] = integers * (same.weight.detach() != 0), step  # pruned ones stay so
        self._finish(finished, of_copy)
        dead_channels.cut_dead(finished, self.sizes.example.to(integers.device))
        return finished

    def _finish(self, model: nn.Module, codes: Codes) -> None:
        """Make plain layers: weights ``integers * step``, norms folded, scales and biases of few
        bits."""
        for layer, (integers, step) in codes.items():
            layers.fold(layer, LearnedGrid)
            layer.weight = nn.Parameter(integers * step)
        fold_batch_norm(model, self.sizes.example.to(integers.device))
        dead_channels.zero_constant(model, self.groups)
        for layer, (integers, _) in codes.items():
            _few_bits(layer, integers)


class Pressure(nn.Module):
    """Strength of the penalty, and what it follows. All are buffers, so that a training resumes with
    them."""

    strength: Tensor
    octaves: Tensor
    honest: Tensor
    first: Tensor
    steps: Tensor
    progress: Tensor
    wanted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("strength", torch.tensor(2.0**START))
        self.register_buffer("octaves", torch.tensor(START))
        self.register_buffer("honest", torch.tensor(1.0))  # bits of the coder for one of the model
        self.register_buffer("first", torch.tensor(0.0))  # log2 of the bits at the start
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("progress", torch.tensor(0.0))
        self.register_buffer("wanted", torch.tensor(0.0))  # bits of all weights at the end


class LearnedGrid(nn.Module):
    """Parametrization that rounds a weight to ``integer * step``; ``steps`` are the weights last
    rounded, divided by their step."""

    def __init__(self, step: float, pressure: Pressure) -> None:
        super().__init__()
        self.finest = math.log(step) / QUICK
        self.logarithm = nn.Parameter(torch.tensor([self.finest]))
        self.pressure = pressure
        self.steps: Tensor | None = None

    def step(self) -> Tensor:
        return (QUICK * self.logarithm).exp()

    def keep_coarse(self) -> None:
        """Keep steps from becoming finer than they were: small layers feel the penalty least."""
        with torch.no_grad():
            self.logarithm.clamp_(min=self.finest)

    def forward(self, weight: Tensor) -> Tensor:
        step = self.step().reshape([1] * weight.dim())
        steps = weight / step
        self.steps = steps if self.training and torch.is_grad_enabled() else None
        return grids.to_codes(steps, BITS) * step


def _first_step(weight: Tensor) -> float:
    if not weight.any():
        return 1.0
    spread = float(weight[weight != 0].square().mean().sqrt())
    return max(FINE * spread, float(weight.abs().max()) / ROOM)


def _before(layer: Layer, grid: LearnedGrid) -> Tensor:
    """Return what ``grid`` rounds; or the rounded weight, if a later technique has folded it."""
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    links = list(cast(nn.ModuleList, layer.parametrizations["weight"]))  # type: ignore[union-attr,index]
    if grid not in links:
        return layer.weight
    value = layers.original(layer)
    for link in links[: links.index(grid)]:
        value = link(value)
    return value


def _bits(steps: Tensor) -> tuple[Tensor, float]:
    """Return the bits of a layer by ``rate_model.bits``, in eights where that is clearly less."""
    shape = (*steps.shape[:2], math.prod(steps.shape[2:]))
    spent, eights = rate_model.bits(steps.reshape(shape)), arithmetic.eights(shape)
    if eights is None:
        return spent
    other = rate_model.bits(steps.reshape(eights))
    return other if other[1] < CLEARLY * spent[1] else spent


def _coded(codes: Codes) -> int:
    return rate_distortion.coded_bytes(GridWeights(one, step, BITS) for one, step in codes.values())


def _few_bits(layer: Layer, integers: Tensor) -> None:
    """Put a layer, perhaps with a norm folded into it, on ``integers * scale[output channel]``."""
    flat, weight = integers.flatten(1), layer.weight.detach().flatten(1)
    energy = flat.square().sum(1)
    scale = torch.where(energy > 0, (flat * weight).sum(1) / energy.clamp_min(1), 1.0)
    used = scale[energy > 0]
    if len(used):
        scale[energy == 0] = used[0].abs()  # one value more would cost bytes
        if not torch.allclose(used, used[0], rtol=1e-5, atol=0):
            scale = _rounded(scale)
        else:  # on a grid of its own
            scale[:] = grids.multiples(used[0], grids.step_for(used[0], SCALE_BITS))
    signed = integers * scale.sign().reshape(-1, *[1] * (integers.dim() - 1))
    size = scale.abs().clamp_min(grids.SMALLEST_SCALE)
    layer.weight = nn.Parameter(signed * size.reshape(-1, *[1] * (integers.dim() - 1)))
    layer.weight_format = IntegerWeights(BITS, size)  # type: ignore[assignment]
    if layer.bias is not None and not parametrize.is_parametrized(layer, "bias"):
        bias = layer.bias.detach()
        layer.bias = nn.Parameter(grids.multiples(bias, grids.step_for(bias, BIAS_BITS)))


def _rounded(scale: Tensor) -> Tensor:
    """Round ``scale`` to one grid; or, where values differ too much, each by a sixteenth at most."""
    step = grids.step_for(scale, BIAS_BITS)
    if float(scale.abs().min()) >= SMALLEST * step:
        return grids.multiples(scale, step)
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2 * SMALLEST).round(), exponent) / (2 * SMALLEST)
