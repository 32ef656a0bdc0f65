import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import PenjingError
from penjing.profiling import profile
from penjing.tasks import from_arrays
from penjing.techniques.factorize import Spectrum, factorize, truncated_svd, tucker2


@pytest.fixture(scope="module")
def task():
    images = np.random.default_rng(0).integers(0, 256, (32, 12, 12, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(32) % 4, test=4, validation=4)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.Conv2d(48, 48, 3, padding=2, dilation=2, groups=48),
        nn.Conv2d(48, 64, 1, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    ).eval()


@pytest.mark.parametrize("rank", [1, 5, 19, 20])
def test_svd_error_is_that_of_eckart_and_young(rank):
    torch.manual_seed(rank)
    matrix = torch.randn(20, 33, dtype=torch.float64)
    left, right = truncated_svd(matrix, rank)
    assert left.shape == (20, rank) and right.shape == (rank, 33)
    dropped = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    error = torch.linalg.norm(matrix - left @ right)
    assert float(error) == pytest.approx(np.sqrt((dropped**2).sum()), abs=1e-9)


@pytest.mark.parametrize("ranks", [(4, 3), (8, 6), (10, 12)])
def test_tucker_is_as_good_as_tensorlys(ranks):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    torch.manual_seed(0)
    weight = torch.randn(10, 12, 3, 3, dtype=torch.float64)
    core, outputs, inputs = tucker2(weight, ranks)
    mine = torch.einsum("abkl,oa,ib->oikl", core, outputs, inputs)
    (theirs, factors), _ = partial_tucker(
        weight.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=100, tol=1e-9
    )
    other = tensorly.tenalg.multi_mode_dot(theirs, factors, modes=[0, 1])
    theirs_error = np.linalg.norm(weight.numpy() - other)
    assert float(torch.linalg.norm(weight - mine)) <= 1.01 * theirs_error + 1e-9


def test_low_rank_weights_are_replaced_without_loss(task):
    """Weights of low rank: 30 % of the parameters go, and the output stays."""
    model = net()
    with torch.no_grad():
        core = torch.randn(6, 5, 3, 3)
        basis = torch.randn(48, 6), torch.randn(32, 5)
        model[2].weight.copy_(torch.einsum("abkl,oa,ib->oikl", core, *basis) / 20)
        model[5].weight.copy_((torch.randn(64, 8) @ torch.randn(8, 48))[..., None, None] / 20)
        model[8].weight.copy_(torch.randn(64, 9) @ torch.randn(9, 256) / 20)
    small = factorize(model, task, ratio=0.3)
    assert parameters(small) <= 0.7 * parameters(model)
    images = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(small(images), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
def test_ratio_is_met_and_nothing_gets_slower(task, ratio):
    model = net()
    small = factorize(model, task, ratio=ratio)
    assert ratio <= 1 - parameters(small) / parameters(model) < ratio + 0.02
    macs = {layer.name: layer.macs for layer in profile(model, task.example).layers}
    for layer in profile(small, task.example).layers:
        macs[layer.name.split(".")[0]] -= layer.macs
    assert all(saved >= 0 for saved in macs.values())


def test_structure(task):
    small = factorize(net(), task, ratio=0.6)
    assert isinstance(small[4], nn.Conv2d) and small[4].groups == 48
    first, core, last = small[2]
    assert (first.kernel_size, core.kernel_size, last.kernel_size) == ((1, 1), (3, 3), (1, 1))
    assert (first.stride, core.stride, last.stride) == ((1, 1), (2, 2), (1, 1))
    assert [name for name, _ in small[8].named_children()] == ["0", "1"]
    assert small[8][0].bias is None and small[8][1].bias is not None


def test_a_strided_layer_is_left_alone_when_its_first_factor_costs_more():
    flat = torch.linspace(1, 0, 17)
    slow = Spectrum(flat, flat, (16, 16, 9), stride=16)
    fast = Spectrum(flat, flat, (16, 16, 9), stride=1)
    assert slow.ranks(0.9) is None and fast.ranks(0.9) == (9, 9)


def test_shared_layers_stay_shared(task):
    layer = nn.Conv2d(32, 32, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), layer, nn.ReLU(), layer)
    small = factorize(model, task, ratio=0.5)
    assert small[1] is small[3] and isinstance(small[1], nn.Sequential)


def test_too_much(task):
    with pytest.raises(PenjingError, match="at most"):
        factorize(net(), task, ratio=0.99)
