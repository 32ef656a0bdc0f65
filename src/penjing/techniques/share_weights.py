"""Weight sharing: all weights of a layer take the values of one small codebook."""

from __future__ import annotations

from typing import Annotated, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.net import layers
from penjing.net.layers import CodebookWeights, Layer
from penjing.net.norms import fold_batch_norm
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task
from penjing.techniques.by_layer import ByLayer
from penjing.techniques.technique import Attached, Kind, Technique, apply

ITERATIONS = 300


class ShareWeights(Technique):
    """Cluster each layer's weights by k-means and keep one value a cluster.

    Source: Han et al. 2016, "Deep compression", section 3. The first centroids lie evenly between
    the smallest and the largest weight, which keeps the few large weights; in training a centroid's
    gradient is the sum of its weights' gradients. Zeros of a sparse layer stay a value of their own.
    Batch norms are folded first.
    """

    name: ClassVar[str] = "share_weights"
    kind: ClassVar[Kind] = Kind.CODEBOOK

    bits: ByLayer[Annotated[int, Field(ge=1, le=8)]] = 5
    """Bits of an index: a codebook has ``2**bits`` values."""
    linear_bits: int | None = Field(default=None, ge=1, le=8)
    """Bits of fully connected layers, whatever ``bits`` says; None takes ``bits``."""

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Fold, cluster, replace. Raises ``PenjingError`` for NaN or infinity in a layer's weights."""
        layers.check_finite(layers.compressible(model))
        device = next(model.parameters()).device
        fold_batch_norm(model, task.example.to(device))
        found = layers.compressible(model)
        for name, chosen in self.each("bits", found).items():
            bits = self.linear_bits if isinstance(found[name], nn.Linear) else None
            bits = bits or chosen
            if bits is not None:
                _share(found[name], bits)
                # A technique that is attached later must keep equal weights equal.
                _note_format(found[name], bits)
        return SharedWeights(self)


class SharedWeights(Attached):
    """Weights that are looked up in the codebooks of their layers."""

    def bake(self, model: nn.Module) -> None:
        """Leave each layer with weights that take only its codebook's values."""
        for layer in layers.compressible(model).values():
            codebook = _codebook(layer)
            if codebook is not None and layers.fold(layer, Codebook):
                _note_format(layer, codebook.bits)


def share_weights(model: nn.Module, task: Task, **settings: object) -> nn.Module:
    """Return a copy of ``model`` with shared weights, post-training.

    ``settings`` are the fields of ``ShareWeights``. Raises what ``ShareWeights.attach`` raises.
    """
    return apply(ShareWeights(**settings), model, task)  # type: ignore[arg-type]


def _note_format(layer: Layer, bits: int) -> None:
    layer.weight_format = CodebookWeights(bits, layer.weight.detach().unique())  # type: ignore[assignment]


class Codebook(nn.Module):
    """Parametrization that looks every weight up: ``values[indices]``.

    ``values`` (float32 ``[k]``) learn. Index ``k`` stands for a zero that does not.
    """

    def __init__(self, values: Tensor, indices: Tensor, bits: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.indices: Tensor
        self.register_buffer("indices", indices)
        self.bits = bits

    def forward(self, _weight: Tensor) -> Tensor:
        return torch.cat([self.values, self.values.new_zeros(1)])[self.indices]


def k_means(values: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster by Lloyd's algorithm in one dimension, from evenly spaced centroids.

    A centroid without values moves to the value that is worst off, as in scikit-learn.

    Args:
        values: float ``[n]``.
        clusters: number of centroids, at least 1.

    Returns:
        Centroids, ascending, float64 ``[k]`` with ``k <= clusters`` (none is without values), and
        the index of every value's centroid, int64 ``[n]``.
    """
    ordered = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], min(clusters, len(np.unique(ordered))))
    for _ in range(ITERATIONS):
        moved = _means(ordered, sums, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    used, nearest = np.unique(_nearest(centroids, values), return_inverse=True)
    return centroids[used], nearest


def _means(ordered: np.ndarray, sums: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    # A cluster is a run of the sorted values, so that prefix sums give its mean.
    borders = np.searchsorted(ordered, _middles(centroids))
    edges = np.concatenate([[0], borders, [len(ordered)]])
    counts = np.diff(edges)
    means = np.diff(sums[edges]) / np.maximum(counts, 1)
    empty = counts == 0
    if empty.any():
        distance = np.abs(ordered - centroids[_nearest(centroids, ordered)])
        means[empty] = ordered[np.argsort(distance)[-empty.sum() :]]
    return np.sort(means)


def _nearest(centroids: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.searchsorted(_middles(centroids), values, side="right")


def _middles(centroids: np.ndarray) -> np.ndarray:
    return (centroids[1:] + centroids[:-1]) / 2


def _share(layer: Layer, bits: int) -> None:
    weight = layer.weight.detach()
    flat = weight.cpu().numpy().reshape(-1)
    shared = flat != 0 if layers.is_sparse(layer) else np.ones(flat.shape, bool)
    codebook = _cluster(flat, shared, bits, weight)
    # Not a function of the former weight: what trains from here on is the codebook.
    parametrize.register_parametrization(layer, "weight", codebook, unsafe=True)


def _cluster(flat: np.ndarray, shared: np.ndarray, bits: int, weight: Tensor) -> Codebook:
    clusters = 2**bits - (not shared.all())
    centroids, nearest = np.zeros(0), np.zeros(0, np.int64)
    if shared.any():
        centroids, nearest = k_means(flat[shared], max(clusters, 1))
    indices = np.full(flat.shape, len(centroids))
    indices[shared] = nearest
    values = torch.from_numpy(centroids).to(weight)
    return Codebook(values, torch.from_numpy(indices).reshape(weight.shape).to(weight.device), bits)


def _codebook(layer: Layer) -> Codebook | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    links = list(cast(nn.ModuleList, layer.parametrizations["weight"]))  # type: ignore[index]
    return next((link for link in links if isinstance(link, Codebook)), None)
