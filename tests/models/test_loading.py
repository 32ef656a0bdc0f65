import sys

import pytest
import torch
import torchvision
from torch import nn

from penjing import models
from penjing.errors import PenjingError
from penjing.tasks import Preprocessing


def test_torchvision_model_is_torchvisions():
    model = models.load("torchvision:mobilenet_v2", num_classes=5)
    expected = torchvision.models.mobilenet_v2(num_classes=5).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    assert not model.training


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18", "penjing:resnet8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_classes_and_channels(spec, channels):
    model = models.load(spec, num_classes=4, channels=channels)
    assert model(torch.zeros(1, channels, 32, 32)).shape == (1, 4)


def test_auxiliary_heads_are_left_out():
    model = models.load("torchvision:googlenet", num_classes=4).train()
    assert isinstance(model(torch.zeros(2, 3, 64, 64)), torch.Tensor)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet19", "did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "is not known"),
        ("timm:resnt18", "did you mean resnet18"),
        ("penjing:lenet-5", "did you mean lenet5"),
        ("penjing:resnet-20", "did you mean .*resnet20_cifar"),
        ("resnet18", "not a model; expected torchvision:NAME"),
        ("torchvision:", "not a model"),
        ("keras:resnet50", "not a model"),
        ("absent.py:net", r"absent\.py: no such file"),
    ],
)
def test_unknown_names_are_answered_with_close_ones(spec, message):
    for ask in (models.load, models.preprocessing):
        with pytest.raises(PenjingError, match=message):
            ask(spec)


def test_says_how_to_get_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PenjingError, match=r"pip install penjing\[timm\]"):
        models.load("timm:resnet18")


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_layers.py").write_text("from torch import nn\nhead = nn.Linear\n")
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "from penjing.tasks import Preprocessing\n"
        "preprocessing = Preprocessing(size=4, mean=(0,) * 3, std=(1,) * 3)\n"
        "def net(num_classes=2):\n"
        "    from my_layers import head\n"
        "    return nn.Sequential(nn.Flatten(), head(48, num_classes))\n"
        "def number():\n"
        "    return 3\n"
        "def broken():\n"
        "    raise KeyError('oops')\n"
    )
    return file


def test_user_file(user_file):
    # The factory takes no channels, so it is not given them.
    model = models.load(f"{user_file}:net", num_classes=6, channels=3)
    assert model(torch.zeros(1, 3, 4, 4)).shape == (1, 6)
    assert models.preprocessing(f"{user_file}:net").size == 4


def test_wrappers_around_a_users_model_are_taken_off(user_file, tmp_path):
    """So that it trains without a compiler, and its weights have the names of the net itself."""
    with user_file.open("a") as file:
        file.write(
            "import torch\n"
            "def parallel(): return nn.DataParallel(net())\n"
            "def compiled(): return torch.compile(nn.DataParallel(net()))\n"
            "def scripted(): return torch.jit.script(nn.ReLU())\n"
        )
    torch.save(models.load(f"{user_file}:net").state_dict(), tmp_path / "w.pt")
    for factory in ("parallel", "compiled"):
        model = models.load(f"{user_file}:{factory}", weights=tmp_path / "w.pt")
        assert list(model.state_dict()) == ["1.weight", "1.bias"]
        assert type(model) is nn.Sequential and not model.training
    with pytest.raises(PenjingError, match="TorchScript"):
        models.load(f"{user_file}:scripted")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nett", "has no function nett"),
        ("number", "returned int, expected an nn.Module"),
        ("broken", "failed with KeyError"),
    ],
)
def test_says_what_is_wrong_with_a_user_file(user_file, factory, message):
    with pytest.raises(PenjingError, match=message):
        models.load(f"{user_file}:{factory}")


def test_says_that_a_user_file_does_not_run(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("import absent_package\n")
    with pytest.raises(PenjingError, match="failed with ModuleNotFoundError"):
        models.load(f"{file}:net")


def test_preprocessing_of_torchvision_and_timm():
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert models.preprocessing("torchvision:resnet18") == Preprocessing(
        size=224, resize=256, **imagenet
    )
    # https://github.com/huggingface/pytorch-image-models: crop_pct 0.875, bicubic
    assert models.preprocessing("timm:tf_efficientnet_lite0") == Preprocessing(
        size=224, resize=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )


def test_preprocessing_of_timms_oblong_and_padded_inputs():
    oblong = models.preprocessing("timm:vit_base_patch16_sapiens2")
    assert (oblong.height, oblong.width, oblong.resize) == (1024, 768, None)
    assert models.preprocessing("timm:volo_d4_448").resize == 448


def test_preprocessing_for_another_number_of_channels():
    grey = models.preprocessing("torchvision:resnet18", channels=1)
    assert grey.channels == 1
    assert grey.mean == pytest.approx((0.449,)) and grey.std == pytest.approx((0.226,))
    colour = models.preprocessing("penjing:lenet5", channels=3)
    assert colour.mean == pytest.approx((0.1307,) * 3)


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_torchvision_classifier_has_preprocessing(name):
    assert models.preprocessing(f"torchvision:{name}").size >= 224


def test_weights_are_loaded(tmp_path):
    source = models.load("penjing:lenet_300_100")
    torch.save(source.state_dict(), tmp_path / "net.pt")
    model = models.load("penjing:lenet_300_100", weights=tmp_path / "net.pt")
    image = torch.randn(1, 1, 28, 28)
    assert torch.equal(model(image), source(image))
    assert isinstance(model, nn.Module)
