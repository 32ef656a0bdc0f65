import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from penjing.errors import PenjingError
from penjing.net import snapshot
from penjing.net.layers import CodebookWeights, IntegerWeights, compressible
from penjing.tasks import from_arrays
from penjing.techniques import techniques
from penjing.techniques.prune_weights import PruneWeights


@pytest.fixture(scope="module")
def task():
    images = np.random.default_rng(0).integers(0, 256, (32, 12, 12, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(32) % 4, test=4, validation=4)


class Same(nn.Conv2d):
    """A convolution of the user's own, as timm has them."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Sequential(Same(3, 24, 2, stride=2), nn.BatchNorm2d(24), nn.PReLU(24))
        self.one = nn.Conv2d(24, 32, 3, padding=1)
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.again = self.shared
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.point = nn.Conv2d(32, 48, 1)
        self.head = nn.Linear(48, 4)
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("shift", torch.rand(1))

    def forward(self, x):
        x = self.again(F.relu(self.shared(F.relu(self.one(self.stem(x))))))
        x = self.point(F.relu(self.norm(self.depthwise(x))))
        return self.head(F.relu(x).mean((2, 3))) * self.scale + self.shift


def round_trip(model: nn.Module, folder, fresh: nn.Module, example) -> nn.Module:
    snapshot.save(model.eval(), folder)
    assert snapshot.exists(folder)
    loaded = snapshot.load(fresh.eval(), folder)
    batch = torch.randn(3, *example.shape[1:])
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))
    return loaded


CHAINS = [
    [],
    ["prune_channels"],
    ["prune_weights"],
    ["factorize"],
    ["quantize"],
    ["share_weights"],
    ["prune_channels", "factorize", "prune_weights", "quantize"],
    ["prune_weights", "share_weights"],
]
SETTINGS = {
    "prune_channels": {"ratio": 0.3},
    "prune_weights": {"sparsity": 0.5},
    "factorize": {"ratio": 0.3},
    "quantize": {"weight_bits": 8, "activation_bits": 8},
    "share_weights": {"bits": 4},
}


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "+".join(chain) or "nothing")
def test_every_technique_comes_back_bit_for_bit(task, tmp_path, chain):
    from penjing.techniques import apply

    known = techniques()
    model = Net().eval()
    for name in chain:
        if name not in known:
            pytest.skip(f"there is no technique {name}")
        model = apply(known[name](**SETTINGS[name]), model, task)
    loaded = round_trip(model, tmp_path, Net(seed=1), task.example)
    assert loaded.shared is loaded.again
    pairs = zip(compressible(model).items(), compressible(loaded).items(), strict=True)
    for (name, before), (other, after) in pairs:
        assert name == other and type(before) is type(after)
        assert getattr(before, "sparse", False) == getattr(after, "sparse", False)
        same_format(getattr(before, "weight_format", None), getattr(after, "weight_format", None))
    # What was loaded can be saved again.
    round_trip(loaded, tmp_path / "again", Net(seed=2), task.example)


def same_format(before, after) -> None:
    assert type(before) is type(after)
    if isinstance(before, IntegerWeights):
        assert before.bits == after.bits and torch.equal(before.scale, after.scale)
    if isinstance(before, CodebookWeights):
        assert before.bits == after.bits and torch.equal(before.values, after.values)


def test_nothing_is_pickled(task, tmp_path):
    snapshot.save(Net(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "structure.json"}
    json.loads((tmp_path / "structure.json").read_text())


def test_attached_techniques_are_refused(task, tmp_path):
    model = Net()
    PruneWeights(sparsity=0.5).attach(model, task)
    with pytest.raises(PenjingError, match="bake it"):
        snapshot.save(model, tmp_path)
    assert not snapshot.exists(tmp_path)


def test_wrong_model_and_broken_folder(tmp_path):
    with pytest.raises(PenjingError, match="not a complete snapshot"):
        snapshot.load(Net(), tmp_path)
    snapshot.save(Net(), tmp_path)
    with pytest.raises(PenjingError, match="snapshot"):
        snapshot.load(torchvision.models.resnet18(weights=None), tmp_path)
    text = (tmp_path / "structure.json").read_text().replace('"version": 1', '"version": 9')
    (tmp_path / "structure.json").write_text(text)
    with pytest.raises(PenjingError, match="version 9"):
        snapshot.load(Net(), tmp_path)
