"""The smallest file: weights on one integer grid a layer, chosen for what they cost in the file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.errors import PenjingError
from penjing.net import layers, observation
from penjing.net.layers import IntegerWeights, Layer
from penjing.net.norms import fold_batch_norm
from penjing.net.observation import LayerStatistics
from penjing.quantization import rate_distortion, rate_distortion_sensitivity
from penjing.quantization.grids import WeightQuantizer
from penjing.quantization.output_correction import correct_outputs, sharpen
from penjing.quantization.rate_distortion import GridWeights
from penjing.quantization.rate_distortion_sensitivity import Sensitivity
from penjing.targets.target import STANDARD, FileSize, Target
from penjing.tasks import Task, interval, outputs_of
from penjing.tasks.interval import Comparison
from penjing.tasks.outputs import evaluating
from penjing.tasks.task import SplitName
from penjing.techniques.technique import Attached, Kind, Technique, apply

CORRECTION_IMAGES = 96
TRAINING_IMAGES = 512
"""Number of training images on which classes are compared with the original's."""
TRIED = 16
"""Bounds hold for so many distortions at once: about as many as a search for a score looks at."""
FILES = 6
"""Attempts in the search for a size, each of which leaves more to spare."""


class CompressWeights(Technique):
    """Put the weights of every layer on one integer grid, so that the network's outputs change as
    little as possible for the size of its ``.penjing`` file.

    Batch norms are folded first. One number, the distortion that every weight may do, gives all
    layers their steps from their sensitivities; it is given, or found for a size or a score. Biases
    then give the outputs their means back, steps their spread and the logits their sharpness.
    Activations stay in float.

    Post-training, the integers of a row depend on one another (trellis-coded quantization), which
    the container makes use of. In quantization-aware training they do not: rounding lets gradients
    pass and the steps learn."""

    name: ClassVar[str] = "compress_weights"
    kind: ClassVar[Kind] = Kind.CODED

    distortion: float | None = Field(default=None, gt=0)
    """Divergence that the rounding of one weight may cost."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Largest size of the ``.penjing`` file."""
    max_drop: float | None = Field(default=None, gt=0)
    """Largest loss of score: the upper bound of what the validation images tell. Where they are too few
    for any bound, training images count, too: at most so large a share of all images may get another
    class than from the original."""
    calibration: int = Field(default=512, ge=1)
    """Number of training images to find sensitivities on."""

    @model_validator(mode="after")
    def _one_aim(self) -> CompressWeights:
        aims = [self.distortion, self.max_bytes, self.max_drop]
        if sum(aim is not None for aim in aims) != 1:
            raise ValueError("give one of distortion, max_bytes and max_drop")
        return self

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Fold, measure sensitivities, search, round, correct.

        Raises ``PenjingError`` for NaN or infinity in a layer's weights or inputs, and when not even
        the finest grid meets the aim.
        """
        device = next(model.parameters()).device
        found = layers.compressible(model)
        layers.check_finite(found)
        fold_batch_norm(model, task.example.to(device))
        for layer in found.values():
            if layer.bias is None:  # the correction may need one: how finely, its gradient says
                layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        batches = [batch.to(device) for batch in task.calibration(self.calibration)]
        some = torch.cat(batches)[:CORRECTION_IMAGES]
        known = rate_distortion_sensitivity.sensitivities(
            model, found, batches[:-1] or batches, classifies=task.classifies
        )
        outputs = observation.collect(model, found, [some], moments=False)
        sizes = FileSize(target, task.example)
        search = _Search(layers.copied(model), task, sizes, known, outputs, some, batches[-1])
        search.refine(search.distortion(self, roughly=True))
        attached = CompressedWeights(self, search)
        attached.choose(model, dependent=True)
        return attached


@dataclass(eq=False)
class CompressedWeights(Attached):
    """Weights on the grids that a search has found.

    Attributes:
        quantizers: what rounds the weights of each layer, whose scale learns if there is a training.
        distortion: divergence that the rounding of one weight costs.
        bias_gains: curvature of the divergence in each layer's biases.
    """

    settings: CompressWeights
    search: _Search
    quantizers: dict[nn.Module, WeightQuantizer] = field(default_factory=dict)
    distortion: float = 0.0
    bias_gains: dict[nn.Module, float] = field(default_factory=dict)

    def choose(self, model: nn.Module, *, dependent: bool) -> None:
        """Search the distortion, and put the weights of ``model`` on the grids that follow from it."""
        found = layers.compressible(model)
        self.search.dependent = dependent
        self.distortion = self.search.distortion(self.settings)
        self.bias_gains = {found[name]: one.bias_gain for name, one in self.search.known.items()}
        self.search.put_on(model, self.distortion, self.quantizers)

    def step(self, model: nn.Module, progress: float) -> None:
        """Before the first step of a training, choose anew integers that can move one by one."""
        if self.search.dependent:
            self.choose(model, dependent=False)

    def bake(self, model: nn.Module) -> None:
        """Leave the weights on their grids, and biases with few bits."""
        for layer in layers.compressible(model).values():
            quantizer = self.quantizers.get(layer)
            if quantizer is not None:
                _fix(layer, quantizer, self.bias_gains.get(layer, 0.0), self.distortion)


def compress_weights(model: nn.Module, task: Task, **settings: object) -> nn.Module:
    """Return a copy of ``model`` with the weights of the smallest file, post-training.

    ``settings`` are the fields of ``CompressWeights``. Raises what ``CompressWeights.attach`` raises.
    """
    return apply(CompressWeights(**settings), model, task)  # type: ignore[arg-type]


class _Search:
    """Search for the distortion that meets an aim, on copies of the folded ``model``; the integers are
    ``dependent`` or not. ``outputs`` are statistics of ``images``; no sensitivity in ``known`` is from
    the ``unseen`` ones."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        sizes: FileSize,
        known: dict[str, Sensitivity],
        outputs: dict[str, LayerStatistics],
        images: Tensor,
        unseen: Tensor,
    ) -> None:
        self.model, self.task, self.sizes, self.known = model, task, sizes, known
        self.outputs, self.images, self.unseen = outputs, images, unseen
        self.classifies = task.classifies
        with evaluating(model):
            self.expected = model(unseen.contiguous())
        self.dependent = False
        self.found = 2.0**rate_distortion.FIRST
        self.originals: dict[str, Any] = {}
        self.last: tuple[tuple[float, bool], dict[str, GridWeights]] | None = None

    def chosen(self, distortion: float) -> dict[str, GridWeights]:
        """Return the grids of ``distortion``; those asked for last are kept."""
        key = distortion, self.dependent
        if self.last is None or self.last[0] != key:
            found = layers.compressible(self.model)
            chosen = rate_distortion.choose(found, self.known, distortion, dependent=self.dependent)
            self.last = key, chosen
        return self.last[1]

    def refine(self, distortion: float) -> None:
        """Correct the sensitivities by measurements at ``distortion``."""
        found = layers.compressible(self.model)
        chosen = self.chosen(distortion)
        self.known = rate_distortion_sensitivity.refined(
            self.model,
            found,
            self.known,
            {name: one.weight for name, one in chosen.items()},
            {
                name: rate_distortion.predicted(found[name], known, chosen[name])
                for name, known in self.known.items()
            },
            self.unseen,
            classifies=self.classifies,
        )
        self.last = None

    def distortion(self, aim: CompressWeights, *, roughly: bool = False) -> float:
        """Find the distortion that meets the aim, or is in the region where it is met."""
        if aim.distortion is not None:
            return aim.distortion
        if aim.max_bytes is not None:
            return self._for_size(aim.max_bytes, roughly)
        return self._for_score(aim.max_drop or 0.0, roughly)

    def _for_score(self, limit: float, roughly: bool) -> float:
        found = rate_distortion.for_score(
            lambda distortion: self._within(self._compared(distortion), limit), roughly=roughly
        )
        finest = 2.0**rate_distortion.FINEST
        if found <= finest and not self._within(compared := self._compared(finest), limit):
            raise PenjingError(_unreachable(compared, limit))
        return found

    def _within(self, compared: Comparison, limit: float) -> bool:
        state = compared.state(limit, TRIED)
        if state != "cannot be told" or compared.agreement is None:
            return state == "met"
        if (compared.images or 0) >= interval.fewest_images(limit, TRIED):
            return False
        if (compared.agreement_images or 0) >= interval.fewest_images(limit, TRIED):
            return compared.surely_agrees(limit, TRIED)
        return compared.agreement >= 1 - limit

    def _compared(self, distortion: float) -> Comparison:
        """Compare with the original on the validation images; classes on some training images, too."""
        small = self._compressed(distortion)
        compared = interval.compare(self.task, *self._both(small, "validation", None))
        if compared.agreement is None:
            return compared
        before, after, _ = self._both(small, "train", TRAINING_IMAGES)
        return compared.and_agreement(interval.agreements(self.task, before, after))

    def _both(
        self, small: nn.Module, split: SplitName, limit: int | None
    ) -> tuple[Any, Any, Tensor]:
        """Return the outputs of the original and of ``small`` for a split, and the targets."""
        if split not in self.originals:
            self.originals[split] = outputs_of(self.model, self.task.batches(split, limit=limit))[0]
        output, target = outputs_of(small, self.task.batches(split, limit=limit))
        return self.originals[split], output, target

    def _for_size(self, size: int, roughly: bool) -> float:
        """Search by the bytes of the integers alone and estimates of the rest, until a real file is not
        larger."""
        weights = sum(layer.weight.numel() for layer in layers.compressible(self.model).values())
        distortion, found = self.found, None
        for attempt in range(FILES):
            compressed = self._compressed(distortion)
            if found is None:
                file = self.sizes.estimated(compressed)
            else:
                fits, file = self.sizes.at_most(compressed, size)
                if fits:
                    self.found = distortion
                    return distortion
            rest = file - self._coded(distortion)
            spare = attempt * rate_distortion.CLOSE * size / 2
            wanted, first = size - rest - spare, math.log2(distortion)
            found = rate_distortion.for_size(self._coded, wanted, weights, first, roughly=roughly)
            if found is None:
                raise PenjingError(
                    f"max_bytes={size} is too small: {rest} bytes are the graph, biases and layers "
                    "that compress_weights leaves in float (all but Conv1d, Conv2d and Linear), and "
                    "not even weights that are nearly all zero fit beside them; allow a larger file "
                    "or prune first."
                )
            if roughly:
                self.found = found
                return found
            distortion = found
        raise PenjingError(
            f"no file of at most max_bytes={size} was found, the last has {file}; ask for another size."
        )

    def _coded(self, distortion: float) -> int:
        return rate_distortion.coded_bytes(self.chosen(distortion).values())

    def _compressed(self, distortion: float) -> nn.Module:
        model = layers.copied(self.model)
        found = layers.compressible(model)
        quantizers: dict[nn.Module, WeightQuantizer] = {}
        self.put_on(model, distortion, quantizers)
        for name, layer in found.items():
            gain = self.known[name].bias_gain if name in self.known else 0.0
            _fix(layer, quantizers[layer], gain, distortion)
            layers.unparametrize(layer)
        return model

    def put_on(
        self, model: nn.Module, distortion: float, quantizers: dict[nn.Module, WeightQuantizer]
    ) -> None:
        """Give a copy of the network the grids of ``distortion``, and correct its outputs. The layers'
        ``quantizers`` are kept there; those that are on it get other grids."""
        found, originals = layers.compressible(model), layers.compressible(self.model)
        for name, one in self.chosen(distortion).items():
            layer = found[name]
            start = rate_distortion.start(originals[name].weight.detach(), one)
            quantizer = WeightQuantizer(start.new_tensor([one.step]), one.bits)
            if layer in quantizers:
                quantizers[layer].scale, quantizers[layer].bits = quantizer.scale, one.bits
            else:
                parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
                quantizers[layer] = quantizer
            layers.set_original(layer, "weight", start)
        correct_outputs(model, quantizers, found, self.outputs, self.images)
        if self.classifies:
            sharpen(model, quantizers, found, self.unseen, self.expected)


def _unreachable(finest: Comparison, limit: float) -> str:
    seen = f"max_drop={limit:g} cannot be met: the finest grid loses {interval.described(finest, TRIED)}"
    needed = finest.images_needed(limit, TRIED)
    if finest.state(limit, TRIED) == "missed" or needed is None:
        return f"{seen}; allow a larger drop."
    return f"{seen}; about {needed} validation images would tell, or allow a larger drop."


def _fix(layer: Layer, quantizer: WeightQuantizer, bias_gain: float, distortion: float) -> None:
    layers.fold(layer, WeightQuantizer)
    scale = quantizer.positive_scale().detach().expand(len(layer.weight)).clone()
    layer.weight_format = IntegerWeights(quantizer.bits, scale)  # type: ignore[assignment]
    # A layer without a gain is read, not called, if it does anything: whoever reads it may want a bias.
    if bias_gain > 0 and layer.bias is not None and not parametrize.is_parametrized(layer, "bias"):
        bias = rate_distortion.rounded_bias(layer.bias.detach(), bias_gain, distortion)
        layer.bias = nn.Parameter(bias) if bias.any() else None
