import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import PenjingError
from penjing.net.profiling import profile
from penjing.tasks import from_arrays
from penjing.techniques.factorize import Factorize, Spectrum, factorize, truncated_svd, tucker2


@pytest.fixture(scope="module")
def task():
    images = np.random.default_rng(0).integers(0, 256, (72, 12, 12, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(72) % 4, test=4, validation=4)


def images_of(task) -> torch.Tensor:
    return torch.cat(task.calibration(64))


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


def kept(layer: nn.Module, factors: nn.Module, norm: nn.Module, inputs: torch.Tensor) -> float:
    """Share of the variance behind ``norm`` that the factors keep."""
    with torch.no_grad():
        expected, found = norm(layer(inputs)), norm(factors(inputs))
    centred = expected - expected.mean((0, 2, 3), keepdim=True)
    return 1 - float((found - expected).square().sum() / centred.square().sum())


@pytest.mark.parametrize("variance", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("bias", [False, True])
def test_the_variance_that_was_asked_for_is_kept_behind_the_norm(task, variance, bias):
    torch.manual_seed(1)
    layer, norm = nn.Conv2d(3, 40, 3, stride=2, padding=1, bias=bias), nn.BatchNorm2d(40)
    nn.init.normal_(norm.weight)
    norm.weight.data[3] = 0
    norm.running_var.uniform_(0.1, 10)
    norm.running_mean.normal_()
    model = nn.Sequential(layer, norm, nn.ReLU()).eval()
    small = factorize(model, task, variance=variance, calibration=64)
    first, last = small[0]
    assert first.kernel_size == (3, 3) and last.kernel_size == (1, 1) and first.stride == (2, 2)
    images = images_of(task)
    assert kept(layer, small[0], norm, images) >= variance - 1e-5
    # No other projection of one output less keeps as much (Eckart and Young 1936).
    outputs = norm(layer(images)).transpose(0, 1).flatten(1).double().detach().numpy()
    values = np.linalg.svd(outputs - outputs.mean(1, keepdims=True), compute_uv=False) ** 2
    assert values[: first.out_channels - 1].sum() / values.sum() < variance


def test_layers_with_few_patterns_at_their_outputs_are_replaced_without_loss(task):
    """The weights have full rank; the images show them eight directions only."""
    torch.manual_seed(2)
    narrow = nn.Conv2d(3, 8, 3)
    wide = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 1), nn.Linear(64, 64)
    model = nn.Sequential(narrow, *wide[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), wide[2]).eval()
    small = factorize(model, task, variance=0.999999, calibration=64)
    assert small[2][0].out_channels <= 8 and small[5][0].out_features <= 8
    images = images_of(task)
    torch.testing.assert_close(small(images), model(images), rtol=1e-3, atol=1e-3)


def test_groups_and_layers_that_would_grow_stay(task):
    model = net()
    small = factorize(model, task, variance=0.95, calibration=64)
    assert parameters(small) <= parameters(model)
    assert isinstance(small[4], nn.Conv2d) and small[4].groups == 48
    assert not any(module.training for module in small.modules())


def test_outputs_that_are_not_finite_are_named(task):
    model = net()
    with torch.no_grad():
        model[5].bias[0] = float("nan")
    with pytest.raises(PenjingError, match="outputs of layer 5 are NaN"):
        factorize(model, task, variance=0.9)


def test_no_layer_of_low_rank(task):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(PenjingError, match="no layer that becomes smaller"):
        factorize(model, task, variance=0.999)


def test_few_images_do_not_tell_a_rank(task):
    """16 vectors have 15 directions at most, whatever the layer could answer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 64))
    with pytest.raises(PenjingError, match="16 images are too few"):
        factorize(model, task, variance=0.999, calibration=16)


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.5, "variance": 0.9}])
def test_one_aim(settings):
    with pytest.raises(ValueError, match="one of ratio and variance"):
        Factorize(**settings)


def test_layers_that_are_asked_for_their_weight_stay(task):
    """As in EdgeNeXt, whose positions take the type of a projection's weight."""

    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1)
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            x = self.second(self.first(x.to(self.second.weight.dtype)).relu())
            return self.head(x.relu().mean((2, 3)))

    small = factorize(Asked().eval(), task, ratio=0.01)
    assert isinstance(small.second, nn.Conv2d) and isinstance(small.first, nn.Sequential)
