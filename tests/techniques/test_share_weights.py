import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from penjing.errors import PenjingError
from penjing.tasks import Task, from_arrays
from penjing.techniques.quantize import quantize
from penjing.techniques.share_weights import ShareWeights, k_means, share_weights


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(64) % 2, validation=8, test=8)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)
    ).eval()


@pytest.mark.parametrize("clusters", [2, 7, 16, 32])
def test_k_means_is_sklearns(clusters: int) -> None:
    values = np.random.default_rng(0).standard_normal(3000)
    start = np.linspace(values.min(), values.max(), clusters)[:, None]
    peer = KMeans(clusters, init=start, n_init=1, max_iter=300, tol=0).fit(values[:, None])
    centroids, nearest = k_means(values, clusters)
    inertia = np.square(values - centroids[nearest]).sum()
    assert inertia == pytest.approx(peer.inertia_, rel=1e-3)
    np.testing.assert_allclose(np.sort(peer.cluster_centers_.ravel()), centroids, atol=5e-3)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.integers(1, 16))
@settings(deadline=None)
def test_every_value_is_at_its_nearest_centroid(values: list[float], clusters: int) -> None:
    array = np.array(values)
    centroids, nearest = k_means(array, clusters)
    assert 1 <= len(centroids) <= clusters
    assert np.all(np.diff(centroids) >= 0)
    distance = np.abs(array[:, None] - centroids)
    chosen = distance[np.arange(len(array)), nearest]
    np.testing.assert_allclose(chosen, distance.min(1), atol=1e-9)


def test_as_many_clusters_as_values_lose_nothing() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0, 1.0])
    centroids, nearest = k_means(values, 4)
    np.testing.assert_allclose(centroids[nearest], values)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_a_layer_takes_at_most_so_many_values(bits: int, net: nn.Module, task: Task) -> None:
    small = share_weights(net, task, bits=bits, linear_bits=2)
    assert len(small[0].weight.unique()) <= 2**bits
    assert len(small[4].weight.unique()) <= 4
    for layer in (small[0], small[4]):
        assert torch.equal(layer.weight.detach().unique(), layer.weight_format.values)
        assert len(layer.weight_format.values) <= 2**layer.weight_format.bits


def test_zero_is_a_value_of_its_own_in_a_sparse_layer(net: nn.Module, task: Task) -> None:
    net[4].sparse = True
    with torch.no_grad():
        net[4].weight[:, ::2] = 0
    small = share_weights(net, task, bits=2)
    assert ((small[4].weight == 0) == (net[4].weight == 0)).all()
    assert len(small[4].weight.unique()) == 4


def test_a_centroids_gradient_is_the_sum_of_its_weights_gradients(
    net: nn.Module, task: Task
) -> None:
    ShareWeights(bits=2).attach(net, task)
    codebook = net[4].parametrizations.weight[0]
    weight = codebook(torch.empty(0))
    factor = torch.randn_like(weight)
    (weight * factor).sum().backward()
    for index in range(4):
        expected = factor[codebook.indices == index].sum()
        torch.testing.assert_close(codebook.values.grad[index], expected)


def test_training_moves_the_codebook(net: nn.Module, task: Task) -> None:
    attached = ShareWeights(bits=2).attach(net, task)
    before = net[4].weight.detach().unique()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for images, labels in task.batches("train", 16):
        task.loss(net(images), labels).backward()
        optimizer.step()
    attached.bake(net)
    assert len(net[4].weight.unique()) == 4
    assert not torch.equal(net[4].weight.detach().unique(), before)


def test_quantize_after_it_keeps_equal_weights_equal(net: nn.Module, task: Task) -> None:
    shared = share_weights(net, task, bits=3)
    small = quantize(shared, task, weight_bits=8, calibration=16)
    assert len(small[4].weight.unique()) <= 8
    assert small[4].weight_format.bits == 8


def test_nan_is_reported_by_layer(net: nn.Module, task: Task) -> None:
    with torch.no_grad():
        net[4].weight[0, 0] = torch.nan
    with pytest.raises(PenjingError, match="weights of layer 4 hold NaN"):
        share_weights(net, task)
