import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from penjing.errors import PenjingError
from penjing.net import channels
from penjing.net.layers import IntegerWeights, compressible
from penjing.net.profiling import profile
from penjing.tasks import from_arrays
from penjing.techniques.factorize import Factorize
from penjing.techniques.prune_channels import PruneChannels, prune_channels
from penjing.techniques.prune_weights import PruneWeights
from penjing.techniques.quantize import Quantize
from penjing.training import TrainSettings, train


@pytest.fixture(scope="module")
def task():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(64) % 4, test=8, validation=8)


def lively(model: nn.Module) -> nn.Module:
    """Random norms, so that a channel that is silent or moved shows at the output."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def conv(inputs: int, outputs: int, size: int = 3, **settings) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **settings)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A stem, a body that is tested, and a classifier."""

    def __init__(self, body: nn.Module, width: int, positions: int = 1) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 16), body
        self.pool = nn.AdaptiveAvgPool2d(positions)
        self.classifier = nn.Linear(width * positions**2, 4)

    def forward(self, x):
        return self.classifier(self.pool(self.body(self.stem(x))).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(16, 24), conv(24, 16)

    def forward(self, x):
        return F.relu(x + self.two(self.one(x)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(16, 8, 1), conv(16, 12)
        self.after = conv(36, 20)

    def forward(self, x):
        return self.after(torch.cat([self.left(x), x, self.right(x)], 1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = conv(16, 16)

    def forward(self, x):
        return self.layer(self.layer(x))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = conv(16, 24)
        self.down, self.up = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.after = conv(24, 16)

    def forward(self, x):
        x = self.inside(x)
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return self.after(x * torch.sigmoid(gate))


class Ghost(nn.Module):
    """Each channel and what is made of it are two halves, which are added to another layer's outputs:
    two of those go together, since one channel goes with both."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = conv(16, 12, 1), conv(12, 12, groups=12)
        self.shortcut, self.after = conv(16, 24, 1), conv(24, 16, 1)

    def forward(self, x):
        first = self.primary(x)
        return self.after(self.shortcut(x) + torch.cat([first, self.cheap(first)], 1))


class Cascade(nn.Module):
    """Attention of heads that take their part of the channels plus what the head before made of its own
    (Liu et al. 2023, arXiv:2305.07027); the paths through which channels go together have no end."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = conv(16, 32, 1), conv(32, 32, 1)
        self.heads = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(4))
        self.keys = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(4))
        self.project = nn.Sequential(nn.ReLU(), conv(32, 32, 1))

    def forward(self, x):
        x = self.before(x)
        batch, _, height, width = x.shape
        made, parts = [], x.chunk(4, 1)
        head = parts[0]
        for i, part in enumerate(parts):
            head = head + part if i else head
            query, key, value = (
                self.heads[i](head).view(batch, -1, height, width).split([4, 4, 8], 1)
            )
            query = self.keys[i](query).flatten(2)
            mixed = (query.transpose(-2, -1) @ key.flatten(2)).softmax(-1)
            head = (value.flatten(2) @ mixed.transpose(-2, -1)).view(batch, 8, height, width)
            made.append(head)
        return self.after(x + self.project(torch.cat(made, 1)))


class PaddedShortcut(nn.Module):
    """Option A of ResNet-20: the shortcut's channels are padded with zeros by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(16, 32), conv(32, 32)

    def forward(self, x):
        return F.relu(F.pad(x, (0, 0, 0, 0, 8, 8)) + self.two(self.one(x)))


class FixedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(16, 16), conv(16, 16)

    def forward(self, x):
        return self.two(self.one(x).view(-1, 16, 16, 16))


def bodies():
    depthwise = nn.Sequential(conv(16, 24, 1), conv(24, 24, groups=24), conv(24, 16, 1))
    grouped = nn.Sequential(conv(16, 24), conv(24, 24, groups=4), conv(24, 16))
    prelu = nn.Sequential(nn.Conv2d(16, 24, 3), nn.PReLU(24), nn.Conv2d(24, 16, 3))
    return {
        "plain": Net(nn.Sequential(conv(16, 24), conv(24, 16)), 16),
        "flatten": Net(conv(16, 12), 12, positions=4),
        "sigmoid": Net(nn.Sequential(nn.Conv2d(16, 24, 3), nn.Sigmoid(), conv(24, 16)), 16),
        "residual": Net(nn.Sequential(Residual(), Residual()), 16),
        "concat": Net(Concat(), 20),
        "depthwise": Net(depthwise, 16),
        "grouped": Net(grouped, 16),
        "prelu": Net(prelu, 16),
        "shared": Net(Shared(), 16),
        "squeeze": Net(SqueezeExcite(), 16),
        "ghost": Net(Ghost(), 16),
        "padded shortcut": Net(PaddedShortcut(), 32),
        "fixed view": Net(FixedView(), 16),
    }


def bake_exactly(model: nn.Module, technique: PruneChannels, task) -> nn.Module:
    """The baked model, after comparing it with the masked one on inputs that bake did not see."""
    model = copy.deepcopy(model)
    attached = technique.attach(model, task)
    images = torch.randn(4, *task.example.shape[1:])
    with torch.no_grad():
        masked = model(images)
        attached.bake(model)
        torch.testing.assert_close(model(images), masked, rtol=1e-4, atol=1e-5)
    return model


def test_channels_that_one_other_channel_goes_with_go_together(task):
    found = channels.groups(lively(bodies()["ghost"]), task.example)
    tied = next(group for group in found if group.units == 12)
    assert ("body.shortcut.0", "out") in {(piece.layer, piece.side) for piece in tied.slices}
    for piece in tied.slices:
        units = dict(zip(piece.channels.tolist(), piece.units.tolist(), strict=True))
        assert units == {channel: channel % 12 for channel in range(len(piece.channels))}


def test_paths_without_end(task):
    model = lively(Net(Cascade(), 32))
    found = channels.groups(model, task.example)
    assert {"stem.0", "body.after.0"} == {group.root.layer for group in found}
    bake_exactly(model, PruneChannels(ratio=0.1), task)


@pytest.mark.parametrize(
    ("mapping", "known"),
    [
        (lambda indices: indices, True),
        # What Torch-Pruning gives for repeated heads, and for views that it misreads.
        (lambda indices: [index._replace(root_idx=None) for index in indices], False),
        (lambda indices: [index._replace(idx=index.idx * 4) for index in indices], False),
    ],
)
def test_what_the_library_cannot_tell_is_not_pruned(mapping, known):
    layer = nn.Conv2d(3, 8, 3)
    reader = Mock(module=nn.Conv2d(8, 8, 3), dependencies=[])
    edge = Mock(target=reader, handler="cut", index_mapping=[None, mapping])
    graph = Mock(module2node={layer: Mock(module=layer, dependencies=[edge])})
    graph.get_pruner_of_module().get_out_channels.return_value = 8
    found = channels._coupled_with(graph, layer, widest=8)
    assert (found is not None) == known


@pytest.mark.parametrize("name", bodies())
def test_baked_is_masked_and_ratio_is_met(name, task):
    model = lively(bodies()[name])
    original = profile(model, task.example)
    small = bake_exactly(model, PruneChannels(ratio=0.25), task)
    removed = 1 - profile(small, task.example).macs / original.macs
    assert 0.25 <= removed < 0.33
    assert small.classifier.out_features == 4
    before, after = ([len(m.weight) for m in compressible(n).values()] for n in (model, small))
    assert any(b > a for b, a in zip(before, after, strict=True))
    assert all(b >= a for b, a in zip(before, after, strict=True))


def test_bodies_keep_what_must_stay(task):
    """Groups are found for what can be cut, and only for that."""

    def made(model):
        found = channels.groups(lively(model), task.example)
        return {piece.layer for g in found for piece in g.slices if piece.side == "out"}

    nets = bodies()
    assert "stem.0" not in made(nets["padded shortcut"])
    assert "body.one.0" in made(nets["padded shortcut"])
    assert "body.one.0" not in made(nets["fixed view"])
    assert not any("classifier" in made(net) for net in nets.values())


def test_residual_channels_go_together(task):
    technique = PruneChannels(ratio=0.4)
    small = bake_exactly(lively(bodies()["residual"]), technique, task)
    widths = {small.stem[0].out_channels, small.body[0].two[0].out_channels}
    widths |= {small.body[1].two[0].out_channels, small.classifier.in_features}
    assert len(widths) == 1


def test_round_to(task):
    model = lively(bodies()["depthwise"])
    small = bake_exactly(model, PruneChannels(ratio=0.3, round_to=8), task)
    assert all(layer.out_channels % 8 == 0 for layer in small.modules() if hasattr(layer, "groups"))


def test_unreachable_ratio_says_what_can_be_reached(task):
    with pytest.raises(PenjingError, match="at most"):
        prune_channels(lively(bodies()["fixed view"]), task, ratio=0.99)


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_useless_channels_go_first(importance, task):
    """Channels that are made and read by tiny weights are the ones that are cut."""
    model = lively(bodies()["plain"])
    useless = torch.arange(0, 24, 2)
    with torch.no_grad():
        model.body[0][0].weight[useless] *= 1e-3
        model.body[1][0].weight[:, useless] *= 1e-3
        for block in (model.stem, *model.body):
            block[1].bias += 3  # No channel is dead.
    technique = PruneChannels(ratio=0.2, importance=importance)
    left = bake_exactly(model, technique, task).body[0][1].bias.tolist()
    gone = {i for i, value in enumerate(model.body[0][1].bias.tolist()) if value not in left}
    assert gone and gone <= set(useless.tolist())


def test_taylor_leaves_the_model_as_it_is(task):
    model = lively(bodies()["plain"])
    model.stem[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    prune_channels(model, task, ratio=0.2, importance="taylor")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.stem[0].weight.requires_grad


def test_schedule_starts_with_the_whole_model(task):
    model = lively(bodies()["residual"])
    expected = model(task.example)
    attached = PruneChannels(ratio=0.3).attach(model, task)
    assert not torch.allclose(model(task.example), expected)
    attached.step(model, 0.0)
    torch.testing.assert_close(model(task.example), expected)


def test_trained_together_with_weight_pruning(task):
    for order in (0, 1):
        model = lively(bodies()["concat"])
        both = [PruneChannels(ratio=0.2), PruneWeights(sparsity=0.5)][:: 1 - 2 * order]
        attached = [technique.attach(model, task) for technique in both]
        expected = model(task.example)
        for one in reversed(attached):
            one.bake(model)
        torch.testing.assert_close(model(task.example), expected, rtol=1e-4, atol=1e-5)
        assert any((layer.weight == 0).any() for layer in compressible(model).values())


def test_weight_format_is_cut_with_the_channels(task):
    model = lively(bodies()["plain"])
    for layer in compressible(model).values():
        scale = layer.weight.detach().abs().flatten(1).amax(1) / 127
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        layer.weight.data = (layer.weight / scale.view(shape)).round() * scale.view(shape)
        layer.weight_format = IntegerWeights(8, scale)
    small = prune_channels(model, task, ratio=0.3)
    for layer in compressible(small).values():
        scale = layer.weight_format.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        integers = layer.weight / scale
        torch.testing.assert_close(integers, integers.round(), atol=1e-3, rtol=0)


def test_quantized_in_the_same_stage(task):
    """Quantize after pruning works; before it, cutting would lose its grids."""
    model = lively(bodies()["residual"])
    both = [PruneChannels(ratio=0.3), Quantize()]
    attached = [technique.attach(model, task) for technique in both]
    expected = model(task.example)
    for one in reversed(attached):
        one.bake(model)
    torch.testing.assert_close(model(task.example), expected, rtol=1e-3, atol=1e-3)
    assert all(len(m.weight_format.scale) == len(m.weight) for m in compressible(model).values())
    Quantize().attach(again := lively(bodies()["residual"]), task)
    with pytest.raises(PenjingError, match="list prune_channels first"):
        PruneChannels(ratio=0.3).attach(again, task)


def test_factorized_in_the_same_stage(task):
    """The factors' own training may not bring doomed channels back."""
    model = lively(bodies()["residual"])
    both = [PruneChannels(ratio=0.3), Factorize(ratio=0.2)]
    attached = [technique.attach(model, task) for technique in both]
    train(model, task, TrainSettings(epochs=1, batch_size=16, lr=0.05), attached)
    factors = [name for name, _ in model.named_modules() if name.endswith("0.0")]
    for one in reversed(attached):
        one.bake(model)
    assert factors and model(task.example).shape == (1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"]
)
def test_torchvision(name):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    task = from_arrays(images, np.arange(16) % 4, test=4, validation=4)
    model = lively(getattr(torchvision.models, name)(weights=None, num_classes=4))
    small = bake_exactly(model, PruneChannels(ratio=0.4), task)
    removed = 1 - profile(small, task.example).macs / profile(model, task.example).macs
    assert 0.4 <= removed < 0.42
