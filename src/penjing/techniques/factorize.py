"""Replace layers by two or three thinner ones: low-rank approximation of their weights.

By the weights: a linear layer or 1 x 1 convolution becomes two by the singular value decomposition; a
spatial convolution becomes 1 x 1, k x k, 1 x 1 by a Tucker-2 decomposition (Kim et al. 2016,
arXiv:1511.06530). By the outputs: a layer becomes one with fewer outputs and a 1 x 1 that spreads them,
from the principal components of the layer's outputs for images (Zhang et al. 2016, "Accelerating
very deep convolutional networks", section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from penjing.errors import PenjingError
from penjing.net import layers
from penjing.net.norms import fold_batch_norm
from penjing.net.observation import channel_axis, hooked
from penjing.progress import shown
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task
from penjing.tasks.outputs import evaluating
from penjing.techniques.by_layer import ByLayer
from penjing.techniques.technique import Attached, Kind, Technique, apply

Share = Annotated[float, Field(gt=0, lt=1)]
HOOI_SWEEPS = 3
BISECTION_STEPS = 50
SAMPLES = 4
"""Output vectors needed for each rank: fewer cannot show that a direction is unused."""


class Factorize(Technique):
    """Settings of low-rank factorization: either ``ratio`` or ``variance``.

    A layer that would not become smaller and faster stays as it is.

    Attributes:
        ratio: share of the model's parameters to remove, in (0, 1). The ranks of all layers follow
            from one bound on the share of each layer's squared weights that is dropped, the lowest
            that reaches the ratio. Given by layer, it is the share of each layer's weights instead; a
            layer that no pattern fits stays as it is.
        variance: share of the variance of each layer's outputs to keep, in (0, 1), on training
            images. Without training it costs far less accuracy than ``ratio`` where layers give
            few patterns, as those of wide networks on small tasks do.
        calibration: number of training images to find the variance on.
    """

    name: ClassVar[str] = "factorize"
    kind: ClassVar[Kind] = Kind.FACTORS

    ratio: ByLayer[Share] | None = None
    variance: ByLayer[Share] | None = None
    calibration: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _one_aim(self) -> Factorize:
        if (self.ratio is None) == (self.variance is None):
            raise ValueError("give one of ratio and variance")
        return self

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Replace layers by ``nn.Sequential`` of their factors.

        Raises:
            PenjingError: the model has too few layers of low rank for ``ratio`` or none for
                ``variance``, or a layer's outputs on the training images are not finite.
        """
        found = _factorizable(model, task.example)
        shares = self.each("ratio" if self.variance is None else "variance", found)
        found = {name: layer for name, layer in found.items() if shares[name] is not None}
        if self.variance is not None:
            factors = _by_outputs(model, found, task, shares, self.calibration)
        else:
            ranks = self._ranks(model, found, shares)
            factors = {name: _factors(found[name], rank) for name, rank in ranks.items()}
        for name, new in factors.items():
            _replace(model, found[name], new.train(found[name].training))
        return Attached(self)  # the factors are plain layers: nothing is left to do

    def _ranks(
        self, model: nn.Module, found: dict[str, layers.Layer], shares: dict[str, float]
    ) -> dict[str, tuple[int, int]]:
        spectra = {name: _spectrum(layer) for name, layer in found.items()}
        if not isinstance(self.ratio, dict):
            total = sum(p.numel() for p in model.parameters())
            return _choose(spectra, total, self.ratio or 0.0, "this model")
        ranks: dict[str, tuple[int, int]] = {}
        for name, spectrum in spectra.items():
            total = found[name].weight.numel()
            ranks |= _choose({name: spectrum}, total, shares[name], f"layer {name}")
        return ranks


def factorize(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    """Return a copy of ``model`` with thinner layers, post-training. Settings as in ``Factorize``."""
    return apply(Factorize(**settings), model, task)


@dataclass
class Spectrum:
    """Parameters that a layer's ranks save, and the share of its squared weights that they drop."""

    outputs: Tensor
    """Share of the squared weights, or of the outputs' variance, dropped when 0, 1, ... output
    directions are kept."""
    inputs: Tensor | None
    """Share dropped when 0, 1, ... input directions are kept; None for a layer that is a matrix, or
    is taken for one."""
    shape: tuple[int, int, int]
    """Outputs, inputs, and weights in one kernel."""
    stride: int
    """Input positions for each output position: the first factor of a Tucker-2 runs on them all."""

    def ranks(self, dropped: float) -> tuple[int, int] | None:
        """Return the lowest ranks (outputs, inputs) that drop no more than the share ``dropped``,
        or None when the layer is better left alone."""
        if self.inputs is None:
            rank = _lowest(self.outputs, dropped)
            ranks = (rank, rank)
        else:
            # The squared errors of the two sides add up at most (De Lathauwer et al. 2000).
            ranks = _lowest(self.outputs, dropped / 2), _lowest(self.inputs, dropped / 2)
        useful = self.saved(ranks) > 0 and self.saved(ranks, self.stride) > 0
        return ranks if useful else None

    def saved(self, ranks: tuple[int, int], stride: int = 1) -> int:
        """Return the parameters saved (negative: added); with ``stride``, MACs for each output
        position."""
        outputs, inputs, kernel = self.shape
        if self.inputs is None:
            return outputs * inputs - ranks[0] * (outputs + inputs)
        first, core, last = ranks[1] * inputs, ranks[0] * ranks[1] * kernel, ranks[0] * outputs
        return outputs * inputs * kernel - stride * first - core - last


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors ``[m, rank]`` and ``[rank, n]`` whose product is closest to ``matrix`` ``[m, n]``.

    The error's norm is the root of the sum of the dropped squared singular values (Eckart and
    Young 1936). The singular values are shared evenly, which keeps both factors of one scale.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(matrix), (root[:, None] * right[:rank]).to(matrix)


def tucker2(weight: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the core ``[r0, r1, ...]`` and bases ``[out, r0]``, ``[in, r1]`` of a weight ``[out,
    in, ...]``.

    Higher-order orthogonal iteration (De Lathauwer et al. 2000): each basis in turn is the best for
    the other, starting from the singular vectors of the two unfoldings.
    """
    full = weight.double().flatten(2)
    inputs = _leading(full.transpose(0, 1).flatten(1), ranks[1])
    for _ in range(HOOI_SWEEPS):
        outputs = _leading(torch.einsum("oik,ir->ork", full, inputs).flatten(1), ranks[0])
        projected = torch.einsum("oik,or->rik", full, outputs)
        inputs = _leading(projected.transpose(0, 1).flatten(1), ranks[1])
    core = torch.einsum("oik,oa,ib->abk", full, outputs, inputs)
    core = core.reshape(*ranks, *weight.shape[2:])
    return core.to(weight), outputs.to(weight), inputs.to(weight)


def _factorizable(model: nn.Module, example: Tensor) -> dict[str, layers.Layer]:
    """Find the linear and ungrouped convolutional layers that ``example`` runs through, by their
    own ``forward``: of others the weights may be read without a call."""
    # Attention reads the weights of its projections itself, an encoder those of all its layers.
    readers = nn.MultiheadAttention | nn.TransformerEncoderLayer
    reading = [module for module in model.modules() if isinstance(module, readers)]
    taken = {id(child) for module in reading for child in module.modules()}
    plain = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
    found = {
        name: layer
        for name, layer in layers.compressible(model).items()
        if id(layer) not in taken
        and type(layer).forward in plain
        and getattr(layer, "groups", 1) == 1
        and min(layer.weight.shape[:2]) > 1
    }
    called: set[str] = set()
    image = example.to(next(model.parameters()).device)
    with hooked(found, lambda name, *_: called.add(name)), evaluating(model):
        model(image)
    names = [name for name in found if name in called]
    if not _replaceable(model, names, image):  # Rare: code that asks a layer for its weight's type.
        names = [name for name in names if _replaceable(model, [name], image)]
    return {name: found[name] for name in names}


def _replaceable(model: nn.Module, names: list[str], image: Tensor) -> bool:
    """Return whether ``model`` still runs where the layers ``names`` stand inside an
    ``nn.Sequential``."""
    trial = layers.copied(model)
    for name in names:
        layer = trial.get_submodule(name)
        _replace(trial, layer, nn.Sequential(layer))
    try:
        with evaluating(trial):
            trial(image)
    except (AttributeError, TypeError):
        return False
    return True


def _spectrum(layer: Any) -> Spectrum:
    weight = layer.weight.detach().double()
    outputs, inputs = weight.shape[:2]
    kernel = weight[0, 0].numel()
    by_output, by_input = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    stride = math.prod(getattr(layer, "stride", ()))
    side = None if kernel == 1 else _dropped(by_input)
    return Spectrum(_dropped(by_output), side, (outputs, inputs, kernel), stride)


def _dropped(matrix: Tensor) -> Tensor:
    """Return the share of the squared norm outside the first 0, 1, ... singular directions, ``[rank
    + 1]``."""
    small = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    # Squared singular values from the Gram matrix: much faster than those of a long unfolding.
    return _tail(torch.linalg.eigvalsh(small @ small.T))


def _tail(rising: Tensor) -> Tensor:
    """Return the share of the sum of eigenvalues outside the 0, 1, ... largest."""
    tail = rising.clamp(min=0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)]) / tail[0].clamp(min=1e-300)


def _lowest(dropped: Tensor, bound: float) -> int:
    return max(1, int((dropped > bound).sum()))


def _choose(
    spectra: dict[str, Spectrum], total: int, ratio: float, where: str
) -> dict[str, tuple[int, int]]:
    """Return the ranks of the layers to factorize at the lowest bound that removes ``ratio`` of the
    ``total`` parameters; ``where`` they are is for the error if there is none."""

    def at(bound: float) -> dict[str, tuple[int, int]]:
        ranks = {name: spectrum.ranks(bound) for name, spectrum in spectra.items()}
        return {name: rank for name, rank in ranks.items() if rank is not None}

    def removed(ranks: dict[str, tuple[int, int]]) -> float:
        return sum(spectra[name].saved(rank) for name, rank in ranks.items()) / total

    if removed(at(1.0)) < ratio:
        raise PenjingError(
            f"factorize cannot remove {ratio:.0%} of the parameters of {where}, "
            f"at most {max(0.0, removed(at(1.0))):.0%} with ranks of 1; lower ratio."
        )
    low, high = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(at(middle)) >= ratio else (middle, high)
    return at(high)


def _leading(matrix: Tensor, count: int) -> Tensor:
    """Return the first ``count`` left singular vectors of ``matrix``, as columns."""
    # Of the Gram matrix: it is small, the unfolding is long.
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :count]


def _factors(layer: Any, ranks: tuple[int, int]) -> nn.Sequential:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if weight[0, 0].numel() == 1:
        last, first = truncated_svd(weight.flatten(1), ranks[0])
        return nn.Sequential(*_pair(layer, first.reshape(-1, *weight.shape[1:]), last, bias))
    core, last, inputs = tucker2(weight, ranks)
    return nn.Sequential(_pointwise(layer, inputs.T, None), *_pair(layer, core, last, bias))


@dataclass
class _Outputs:
    """Sums over a layer's outputs ``y``, away from a fixed ``middle`` ``[out]``."""

    middle: Tensor
    count: int
    sums: Tensor
    products: Tensor
    """Float64 ``[out]`` and ``[out, out]``."""

    @property
    def mean(self) -> Tensor:
        return self.middle + self.sums / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self.sums / self.count
        return self.products / self.count - mean[:, None] * mean


def _by_outputs(
    model: nn.Module,
    found: dict[str, layers.Layer],
    task: Task,
    shares: dict[str, float],
    images: int,
) -> dict[str, nn.Sequential]:
    """Return the factors of layers that become smaller when their ``shares`` of variance are kept."""
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in task.calibration(images)]
    scales = _norm_scales(model, found, batches[0][:1])
    factors = {}
    for name, seen in _outputs(model, found, batches).items():
        layer, scale = found[name], scales[name]
        if not torch.isfinite(seen.products).all():
            raise PenjingError(
                f"the outputs of layer {name} are NaN or infinite on the training images; check the "
                "model's weights and the preprocessing before factorizing."
            )
        basis, dropped = _components(scale[:, None] * seen.covariance * scale)
        shape = len(layer.weight), layer.weight[0].numel(), 1
        ranks = Spectrum(dropped, None, shape, stride=1).ranks(1 - shares[name])
        if ranks is not None and ranks[0] * SAMPLES <= seen.count:
            factors[name] = _spread(layer, basis[:, : ranks[0]], scale, seen.mean)
    if not factors:
        raise PenjingError(
            "factorize found no layer that becomes smaller with its share of variance: all outputs "
            f"have many patterns, or {images} images are too few to tell; lower variance, raise "
            "calibration, or leave factorize out."
        )
    return factors


def _norm_scales(
    model: nn.Module, found: dict[str, layers.Layer], example: Tensor
) -> dict[str, Tensor]:
    """Return the factor of the norm that follows each output: float64 ``[out]``, 1 without a norm.
    Outputs count as they are after it."""
    folded = layers.copied(model)
    fold_batch_norm(folded, example)
    after = layers.compressible(folded)
    scales = {}
    for name, layer in found.items():
        before = layer.weight.detach().double().flatten(1).norm(dim=1)
        ratio = after[name].weight.detach().double().flatten(1).norm(dim=1) / before
        scales[name] = torch.where(before > 0, ratio, 1.0)
    return scales


def _outputs(
    model: nn.Module, found: dict[str, layers.Layer], batches: list[Tensor]
) -> dict[str, _Outputs]:
    """Return the sums over the outputs of the layers that run."""
    sums: dict[str, _Outputs] = {}

    def watch(name: str, layer: layers.Layer, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.movedim(channel_axis(layer, output), 0).flatten(1)
        if name not in sums:
            middle = rows.mean(1)
            zero = middle.new_zeros(len(middle), dtype=torch.float64)
            sums[name] = _Outputs(middle, 0, zero, torch.outer(zero, zero))
        seen = sums[name]
        rows = rows - seen.middle[:, None]
        seen.count += rows.shape[1]
        seen.sums += rows.sum(1)
        seen.products += rows @ rows.T

    with hooked(found, watch), evaluating(model):
        for batch in shown(batches, "outputs of the layers", len(batches)):
            model(batch)
    return sums


def _components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return principal components as columns ``[out, out]``, and the share of the variance outside
    the first 0, 1, ... of them ``[out + 1]``."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors.flip(1), _tail(values)


def _spread(layer: Any, basis: Tensor, scale: Tensor, mean: Tensor) -> nn.Sequential:
    """``layer`` with its outputs, times ``scale``, projected on ``basis`` ``[out, rank]``, and what
    gives back all of them; around their ``mean``."""
    weight = layer.weight.detach().double()
    inner = basis.T * scale
    outer = torch.where(scale > 0, 1 / scale, 0.0)[:, None] * basis
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    rest = (mean + outer @ (inner @ (bias - mean))).to(layer.weight)
    first = (inner @ weight.flatten(1)).reshape(-1, *weight.shape[1:]).to(layer.weight)
    return nn.Sequential(*_pair(layer, first, outer.to(layer.weight), rest))


def _pair(layer: Any, first: Tensor, last: Tensor, bias: Tensor | None) -> list[nn.Module]:
    """``layer`` with the weight ``first`` ``[rank, ...]``, and what makes all outputs of these:
    ``last`` ``[out, rank]``, with the ``bias``."""
    if isinstance(layer, nn.Linear):
        return [_linear(first, None), _linear(last, bias)]
    return [_like(layer, first), _pointwise(layer, last, bias)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    return _filled(layer, weight, bias)


def _pointwise(layer: Any, matrix: Tensor, bias: Tensor | None) -> nn.Module:
    kind = nn.Conv2d if layer.weight.dim() == 4 else nn.Conv1d
    made = kind(matrix.shape[1], matrix.shape[0], 1, bias=bias is not None, device=matrix.device)
    return _filled(made, matrix.reshape(made.weight.shape), bias)


def _like(layer: Any, weight: Tensor) -> nn.Module:
    """Return a convolution with this weight and ``layer``'s stride, padding and dilation, without
    bias."""
    kind = nn.Conv2d if weight.dim() == 4 else nn.Conv1d
    made = kind(
        weight.shape[1],
        weight.shape[0],
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
        device=weight.device,
    )
    return _filled(made, weight, None)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place where ``old`` is."""
    places = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
    for place in places:
        model.set_submodule(place, new)
