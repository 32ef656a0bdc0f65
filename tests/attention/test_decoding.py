"""Decoding in the file is decoding in PyTorch; the file runs on integers and takes pixels."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from penjing import container
from penjing.attention.decoding import Decoding, decode
from penjing.attention.pixel_input import PixelInput
from penjing.models.heat_map import heat_map
from penjing.targets.onnxruntime import runtime
from penjing.targets.onnxruntime.export import export

HEIGHT, WIDTH = 12, 20


class Maps(nn.Module):
    """Gives its input as maps, through the concatenation that the pass looks for."""

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([maps[:, :1] * 1.0, maps[:, 1:] * 1.0], dim=1)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    path = tmp_path_factory.mktemp("decoding") / "model.onnx"
    export(Maps(), torch.zeros(1, 5, HEIGHT, WIDTH), path, finish=[Decoding()])
    return runtime.session(path)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(-1, 2))
def test_the_file_decodes_as_pytorch_does(session, seed: int, images: int, size: float):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, 5, HEIGHT, WIDTH, generator=generator) * 2
    maps[:, 1:] = maps[:, 1:] / 4 + size
    (found,) = session.run(None, {"image": maps.numpy()})
    expected = decode(maps).numpy()
    assert found.shape == expected.shape == (images, 64, 5)
    assert np.allclose(found[..., 4], expected[..., 4], atol=1e-5)
    real = expected[..., 4] > 0
    assert np.allclose(found[real], expected[real], atol=1e-4)


def test_detections_are_ordered_and_do_not_overlap():
    maps = torch.randn(1, 5, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    maps[:, 1:] += 1
    (found,) = decode(maps)
    kept = found[found[:, 4] > 0]
    assert (kept[1:, 4] <= kept[:-1, 4]).all()
    low = torch.maximum(kept[:, None, :2], kept[None, :, :2])
    high = torch.minimum(kept[:, None, 2:4], kept[None, :, 2:4])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (kept[:, 2:4] - kept[:, :2]).prod(dim=1)
    iou = shared / (area[:, None] + area[None] - shared)
    assert (iou.fill_diagonal_(0) <= 0.5).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_net_in_float_takes_pixels_too(tmp_path: Path, channels: int):
    torch.manual_seed(0)
    net = heat_map(12_000, channels).eval()
    image = torch.randint(256, (2, channels, 64, 96), generator=torch.Generator().manual_seed(0))
    plain, pixels = tmp_path / "plain.onnx", tmp_path / "pixels.onnx"
    example = torch.zeros(1, channels, 64, 96)
    export(net, example, plain)
    export(net, example, pixels, finish=[PixelInput()])
    (expected,) = runtime.session(plain).run(None, {"image": (image / 255).numpy()})
    as_pixels = image.permute(0, 2, 3, 1).contiguous().numpy().astype(np.uint8)
    (found,) = runtime.session(pixels).run(None, {"image": as_pixels})
    assert np.allclose(found, expected, atol=1e-4)


def test_a_trained_detector_runs_on_integers(detector: Path):
    kinds = runtime.kernels(detector / "model.onnx")
    assert kinds["QLinearConv"] > 15 and kinds["Conv"] == kinds["ConvInteger"] == 0
    model = ir.load(detector / "model.onnx")
    image = model.graph.inputs[0]
    assert image.dtype == ir.DataType.UINT8
    (first,) = {use.node.op_type for use in image.uses()}
    assert first == "Transpose"
    (planes,) = [use.node.outputs[0] for use in image.uses()]
    assert {use.node.op_type for use in planes.uses()} == {"DequantizeLinear"}


def test_the_packed_detector_unpacks_to_the_same_file(detector: Path, tmp_path: Path):
    container.unpack(detector / "model.penjing", tmp_path / "again.onnx")
    original = (detector / "model.onnx").read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == original
    onnx.checker.check_model(onnx.load_model_from_string(original))
