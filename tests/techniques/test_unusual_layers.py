"""Techniques on nets whose layers are called in unusual ways: they work, or a sentence says why not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.errors import PenjingError
from penjing.net.layers import compressible
from penjing.tasks import Task, from_arrays
from penjing.techniques.compress_weights import compress_weights
from penjing.techniques.factorize import factorize
from penjing.techniques.prune_channels import prune_channels
from penjing.techniques.quantize import quantize
from penjing.techniques.share_weights import share_weights

TECHNIQUES: dict[str, Callable[[nn.Module, Task], nn.Module]] = {
    "w8a8": lambda model, task: quantize(model, task, calibration=16),
    "w4": lambda model, task: quantize(
        model, task, weight_bits=4, activation_bits=None, calibration=16
    ),
    "prune": lambda model, task: prune_channels(model, task, ratio=0.2),
    "ratio": lambda model, task: factorize(model, task, ratio=0.1),
    "variance": lambda model, task: factorize(model, task, variance=0.9, calibration=16),
    "compress": lambda model, task: compress_weights(
        model, task, distortion=2.0**-20, calibration=16
    ),
    "share": lambda model, task: share_weights(model, task, bits=4),
}


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(40) % 4)


class Net(nn.Module):
    """A convolution, something in between, a linear layer."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.stem, self.between, self.head = nn.Conv2d(3, 8, 3), between, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.vector(self.stem(x).relu()))

    def vector(self, x: Tensor) -> Tensor:
        return self.between(x.mean((2, 3)))


class NeverCalled(Net):
    def vector(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Several(Net):
    def vector(self, x: Tensor) -> Tensor:
        return self.between(self.between(x.mean((2, 3)))).relu()


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(input=x).relu().mean((2, 3))
        return self.head(input=self.between(input=x))


class WeightRead(Net):
    def vector(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.between.weight, self.between.bias)


class NoImages(Net):
    def vector(self, x: Tensor) -> Tensor:
        vector = x.mean((2, 3))
        return vector + self.between(vector[:0]).sum()


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, 2 * y


class ReturnsTwo(Net):
    def vector(self, x: Tensor) -> Tensor:
        one, two = self.between(x.mean((2, 3)))
        return one + two


class Attention(Net):
    def vector(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.between(tokens, tokens, tokens, need_weights=False)[0].mean(1)


class Encoder(Net):
    def vector(self, x: Tensor) -> Tensor:
        return self.between(x.flatten(2).transpose(1, 2)).mean(1)


class PadsItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (3, 3, 3, 3)))


class SmallMap(Net):
    """As timm's ``Conv2dSame``: the kernel does not fit on the layer's own input."""

    def vector(self, x: Tensor) -> Tensor:
        return self.between(F.adaptive_avg_pool2d(x, 2)).mean((2, 3))


NETS = {
    "small-map": lambda: SmallMap(PadsItself(8, 8, 7)),
    "never": lambda: NeverCalled(nn.Linear(5, 6)),
    "several": lambda: Several(nn.Linear(8, 8)),
    "keyword": lambda: ByKeyword(nn.Linear(8, 8)),
    "read": lambda: WeightRead(nn.Linear(8, 8)),
    "no-images": lambda: NoImages(nn.Linear(8, 8)),
    "returns-two": lambda: ReturnsTwo(Twice(8, 8)),
    "attention": lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
    "encoder": lambda: Encoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", NETS)
def test_it_works_or_one_sentence_says_why_not(kind: str, technique: str, task: Task) -> None:
    torch.manual_seed(0)
    model = NETS[kind]().eval()
    try:
        small = TECHNIQUES[technique](model, task)
    except PenjingError as error:
        assert technique in ("prune", "ratio", "variance"), error
        assert "\n" not in str(error)
        return
    with torch.no_grad():
        expected, found = model(task.example), small.eval()(task.example)
    assert found.shape == expected.shape and torch.isfinite(found).all()
    if technique == "w8a8":
        assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_inputs_by_keyword_are_quantized(task: Task) -> None:
    torch.manual_seed(0)
    small = quantize(NETS["keyword"](), task, calibration=16).eval()
    given: list[Tensor] = []
    layer = compressible(small)["between"]
    layer.register_forward_pre_hook(
        lambda _layer, _args, kwargs: given.append(kwargs["input"]), with_kwargs=True
    )
    with torch.no_grad():
        small(task.example)
    quantizer = layer.input_quantizer
    steps = given[0] / quantizer.scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
