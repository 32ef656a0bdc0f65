import io
import tarfile
from pathlib import Path

import pytest
import torch
import torch_pruning
from torch.nn import functional as F

from penjing import models, tasks
from penjing.models.reference import REFERENCE

SHARED = Path(__file__).parents[3] / "shared"

# From the papers and benchmarks that use the nets. Those of MLPerf Tiny are Keras's totals, which
# count the running mean and variance.
PARAMETERS = {
    "lenet_300_100": 266_610,
    "lenet5": 431_080,
    "resnet20_cifar": 269_722,
    "resnet56_cifar": 853_018,
    "vgg16_bn_cifar": 14_724_042,
    "resnet8": 78_666,
    "mobilenet_v1_025": 221_794,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = models.load(f"penjing:{name}")
    counted = list(model.parameters())
    if name in ("resnet8", "mobilenet_v1_025"):
        counted += [b for key, b in model.named_buffers() if key.endswith(("_mean", "_var"))]
    assert sum(tensor.numel() for tensor in counted) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_takes_its_own_preprocessing_and_any_width(name):
    expected = models.preprocessing(f"penjing:{name}")
    image = torch.zeros(2, expected.channels, expected.size, expected.size)
    assert models.load(f"penjing:{name}", num_classes=7)(image).shape == (2, 7)
    other = 4 - expected.channels
    image = torch.zeros(2, other, expected.size, expected.size)
    assert models.load(f"penjing:{name}", num_classes=7, channels=other)(image).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(REFERENCE.keys() - PARAMETERS.keys()))
def test_detectors_give_maps_at_a_quarter_of_any_size(name):
    for channels, height, width in ((3, 64, 96), (1, 128, 80)):
        model = models.load(f"penjing:{name}", channels=channels)
        maps = model(torch.zeros(2, channels, height, width))
        assert maps.shape == (2, 5, height // 4, width // 4)


def test_option_a_shortcut_has_the_papers_form():
    block = models.load("penjing:resnet20_cifar").layer2[0]
    x = torch.randn(1, 16, 8, 8)
    expected = torch.zeros(1, 32, 4, 4)
    expected[:, 8:24] = F.avg_pool2d(x, 1, stride=2)
    assert torch.equal(block.shortcut(x), expected)


def test_inner_channels_of_a_residual_block_can_be_pruned():
    model = models.load("penjing:resnet20_cifar")
    image = torch.zeros(1, 3, 32, 32)
    graph = torch_pruning.DependencyGraph().build_dependency(model, image)
    for block in model.layer3:
        prune = torch_pruning.prune_conv_out_channels
        group = graph.get_pruning_group(block.conv1, prune, idxs=list(range(48)))
        touched = {dependency.dep.target.module for dependency in group}
        assert block.conv2 in touched and model.linear not in touched
        group.prune()
    assert [b.conv1.out_channels for b in model.layer3] == [16] * 3
    assert [b.conv2.in_channels for b in model.layer3] == [16] * 3
    assert model(image).shape == (1, 10)


def test_option_a_shortcut_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    block = models.load("penjing:resnet20_cifar").layer2[0]
    image = torch.randn(1, 16, 8, 8)
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, (image,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), block(image), atol=1e-5, rtol=1e-4)


def cifar_folder(root: Path) -> Path:
    """The test images as an image folder; a few of them also stand in for training."""
    with tarfile.open(SHARED / "data" / "cifar10" / "test.tar") as tar:
        tar.extractall(root / "all", filter="data")
    (found,) = [path for path in (root / "all").rglob("airplane") if path.is_dir()]
    (root / "test").symlink_to(found.parent, target_is_directory=True)
    for folder in found.parent.iterdir():
        (root / "train" / folder.name).mkdir(parents=True)
        image = io.BytesIO(next(folder.iterdir()).read_bytes())
        for i in range(2):
            (root / "train" / folder.name / f"{i}.jpg").write_bytes(image.getvalue())
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top1"), [("resnet20_cifar", 0.8844), ("vgg16_bn_cifar", 0.8796)])
def test_trained_weights_reach_their_stated_score(tmp_path, name, top1):
    weights = SHARED / "models" / f"{name}.safetensors"
    if not weights.is_file() or not (SHARED / "data" / "cifar10" / "test.tar").is_file():
        pytest.skip("the trained weights or CIFAR-10 are not beside the repository")
    model = models.load(f"penjing:{name}", weights=weights)
    task = tasks.load(cifar_folder(tmp_path), models.preprocessing(f"penjing:{name}"))
    assert tasks.evaluate(model, task, "test") == pytest.approx(top1, abs=0.0005)
