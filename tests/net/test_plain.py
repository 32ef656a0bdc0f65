"""Foreign nets in plain form: the outputs stay, and techniques find layers that own their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from penjing.errors import PenjingError
from penjing.net import layers
from penjing.net.plain import plain

IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride)


class PaddedStandardized(Standardized):
    """As timm's ``StdConv2dSame``: it pads by itself, more on one side."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Branches(nn.Module):
    """As RepVGG: two branches that become one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.merged: nn.Module | None = None

    def reparameterize(self) -> None:
        self.merged = nn.Conv2d(3, 8, 3, padding=1)
        padded = F.pad(self.narrow.weight, (1, 1, 1, 1))
        self.merged.weight = nn.Parameter((self.wide.weight + padded).detach())
        assert self.wide.bias is not None and self.narrow.bias is not None
        self.merged.bias = nn.Parameter((self.wide.bias + self.narrow.bias).detach())
        del self.wide, self.narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(x) if self.merged is not None else self.wide(x) + self.narrow(x)


class WrongBranches(Branches):
    def reparameterize(self) -> None:
        super().reparameterize()
        assert self.merged is not None
        nn.init.zeros_(self.merged.weight)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module, gain: float = 1.0) -> None:
        super().__init__()
        self.module, self.gain = module, gain

    def forward(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        return self.gain * self.module(*inputs, **options)


def net(*first: nn.Module) -> nn.Sequential:
    return nn.Sequential(*first, nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3)


def masked() -> nn.Module:
    return prune.l1_unstructured(conv(), "weight", 0.5)


WRAPS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: net(parametrizations.weight_norm(conv())),
    "old weight norm": lambda: net(nn.utils.weight_norm(conv())),
    "spectral norm": lambda: net(parametrizations.spectral_norm(conv())),
    "old spectral norm": lambda: net(nn.utils.spectral_norm(conv())),
    "mask": lambda: net(masked()),
    "standardized": lambda: net(Standardized(3, 8, 3)),
    "standardized, padded": lambda: net(PaddedStandardized(3, 8, 3, stride=2)),
    "norm with activation": lambda: net(conv(), NormAct(8)),
    "SyncBatchNorm": lambda: net(conv(), nn.SyncBatchNorm(8)),
    "branches": lambda: net(Branches()),
    "wrong branches": lambda: net(WrongBranches()),
    "DataParallel": lambda: nn.DataParallel(net(conv())),
    "DataParallel inside": lambda: net(nn.DataParallel(conv())),
    "torch.compile": lambda: torch.compile(net(conv()), backend="eager"),  # type: ignore
    "*inputs": lambda: Wrapper(net(conv())),
    "*inputs that compute": lambda: Wrapper(net(conv()), gain=2.0),
    "lazy": lambda: net(nn.LazyConv2d(8, 3)),
}


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.filterwarnings("ignore")
def test_outputs_stay_and_layers_own_their_weights(name: str) -> None:
    torch.manual_seed(0)
    model = WRAPS[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    made = plain(model, IMAGE)
    if name == "lazy":
        return  # its first weights are made anew in every copy
    with torch.no_grad():
        torch.testing.assert_close(made(IMAGE), model.eval()(IMAGE), rtol=1e-4, atol=1e-5)
    for layer in layers.compressible(made).values():
        assert isinstance(layer._parameters["weight"], nn.Parameter) and layer.weight.is_leaf
        assert not layer._forward_pre_hooks and type(layer) in (nn.Conv2d, nn.Linear)


def test_what_was_meant_stays() -> None:
    made = plain(net(masked()), IMAGE)
    assert layers.is_sparse(made[0]) and float((made[0].weight == 0).float().mean()) == 0.5
    merged = plain(net(Branches()), IMAGE)
    assert [type(m) for m in merged[0].children()] == [nn.Conv2d]
    kept = plain(net(WrongBranches()), IMAGE)
    assert kept[0].merged is None, "branches whose merging changes the outputs stay"
    split = plain(net(conv(), NormAct(8)), IMAGE)
    assert type(split[1][0]) is nn.BatchNorm2d
    assert type(plain(net(conv(), nn.SyncBatchNorm(8)), IMAGE)[1]) is nn.BatchNorm2d
    unwrapped = plain(Wrapper(net(conv())), IMAGE)
    assert isinstance(unwrapped, nn.Sequential)


def test_the_model_given_stays_as_it_is() -> None:
    model = net(masked())
    before = dict(model.state_dict())
    plain(model, IMAGE)
    assert model.state_dict().keys() == before.keys() and len(model[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda: torch.jit.script(net(conv())), "TorchScript"),
        (lambda: net(nn.Conv2d(5, 8, 3)), r"cannot be run on an input of shape \[1, 3, 12, 12\]"),
        (
            lambda: net(conv()).half(),
            r"are float16, expected float32: call \.float\(\) on the model",
        ),
        (lambda: net(conv(), nn.Threshold(0, float("nan"))), "NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_used_is_one_sentence(broken: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(PenjingError, match=said) as error:
        plain(broken(), IMAGE)
    assert "\n" not in str(error.value)
