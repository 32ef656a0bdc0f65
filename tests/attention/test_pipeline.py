"""The big model runs on crops only, and not at all where nothing is found."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from penjing import PenjingError
from penjing.attention import Crop, Motion, Pipeline

CROP = Crop(height=16, width=24)


def frame(*places: tuple[int, int], shade: int = 255) -> np.ndarray:
    picture = np.zeros((120, 160, 3), np.uint8)
    for x, y in places:
        picture[y : y + 20, x : x + 30] = shade
    return picture


class Bright:
    """Finds the places it is told, if they are bright, and counts how often it was asked."""

    def __init__(self, *places: tuple[int, int]) -> None:
        self.places = places
        self.calls = 0

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        self.calls += 1
        seen = [(x, y) for x, y in self.places if picture[y + 5, x + 5].min() > 100]
        rows = [(x, y, x + 30, y + 20, 0.9 - 0.1 * i) for i, (x, y) in enumerate(seen)]
        return np.array(rows, np.float32).reshape(-1, 5)


class Counting:
    """A model that gives each crop's mean, and the sizes of the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        self.batches.append(len(crops))
        return crops.mean(axis=(1, 2, 3))[:, None]


def mean_model(path: Path, batch: int | str) -> Path:
    image = helper.make_tensor_value_info("crop", TensorProto.FLOAT, [batch, 3, "h", "w"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3, 1, 1])
    node = helper.make_node("GlobalAveragePool", ["crop"], ["y"])
    graph = helper.make_graph([node], "g", [image], [result])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


def test_nothing_found_means_nothing_run():
    model = Counting()
    pipeline = Pipeline(Bright((10, 10)), CROP, model)
    assert pipeline(frame()) == [] and model.batches == []
    assert len(pipeline(frame((10, 10)))) == 1 and model.batches == [1]


def test_all_crops_of_a_frame_go_through_the_model_together():
    model = Counting()
    places = [(10, 10), (60, 40), (100, 80)]
    found = Pipeline(Bright(*places), CROP, model)(frame(*places))
    assert model.batches == [3]
    assert [item.box[:2] for item in found] == places
    assert all(item.output == pytest.approx(1.0) for item in found)


def test_several_crops_give_several_views():
    views = [CROP, Crop(height=8, width=8, left=0.4, right=0.4)]
    pipeline = Pipeline(Bright((60, 40)), views, Counting(), postprocess=lambda parts: parts)
    ((item,)) = pipeline(frame((60, 40)))
    whole, wide = (float(part[0]) for part in item.output)
    assert whole == pytest.approx(1.0) and wide < 0.8


def test_views_end_with_one_that_is_enough():
    model = Counting()
    views = [Crop(height=8, width=8, left=0.4, right=0.4), CROP, Crop(height=4, width=4)]
    places = [(10, 10), (60, 40)]
    pipeline = Pipeline(Bright(*places), views, model, enough=lambda output: output[0] > 0.9)
    found = pipeline(frame(*places))
    assert [len(item.output) for item in found] == [2, 2] and model.batches == [2, 2]


@pytest.mark.parametrize("batch", ["n", 1])
def test_a_file_and_a_module_give_the_same(tmp_path: Path, batch: int | str):
    places = [(10, 10), (60, 40)]
    picture = frame(*places, shade=180)
    file = Pipeline(Bright(*places), CROP, mean_model(tmp_path / "mean.onnx", batch))(picture)
    module = Pipeline(Bright(*places), CROP, nn.AdaptiveAvgPool2d(1))(picture)
    for one, other in zip(file, module, strict=True):
        assert one.box == other.box and np.allclose(one.output, other.output, atol=1e-6)


def test_the_detector_rests_between_its_frames():
    detector = Bright((10, 10))
    pipeline = Pipeline(detector, every=4)
    found = list(pipeline.run(frame((10, 10)) for _ in range(9)))
    assert detector.calls == 3
    assert [[item.track for item in part] for part in found] == [[1]] * 9


def test_the_gate_keeps_the_detector_from_still_scenes():
    detector = Bright((10, 10))
    pipeline = Pipeline(detector, motion=Motion(heartbeat=100))
    still = [frame((10, 10))] * 20
    found = list(pipeline.run(still))
    assert detector.calls == 1 and all(len(part) == 1 for part in found)
    pipeline(frame((10, 10), (60, 60), (100, 20)))
    assert detector.calls == 2


def test_what_comes_and_stops_while_the_detector_rests_is_seen():
    detector = Bright((10, 10), (100, 20))
    pipeline = Pipeline(detector, every=4, motion=Motion(heartbeat=1000, memory=2))
    empty, full = frame((10, 10)), frame((10, 10), (100, 20))
    found = list(pipeline.run([empty, empty, full, *[full] * 20]))
    assert [len(part) for part in found[:4]] == [1] * 4
    assert len(found[-1]) == 2


def test_a_still_scene_is_not_read_again():
    model = Counting()
    pipeline = Pipeline(Bright((10, 10)), CROP, model, motion=Motion(heartbeat=1000))
    found = list(pipeline.run([frame((10, 10))] * 9))
    assert model.batches == [1] and all(part == found[0] for part in found)


RUNTIME_ONLY = """
import sys
for name in ("torch", "torchvision", "pycocotools", "optuna", "torch_pruning"):
    sys.modules[name] = None
import numpy as np
from penjing.attention import Crop, Detector, Motion, Pipeline, load
from penjing.attention import bundle, save, video
frames = [shot.frame for shot in video.read(sys.argv[3])]
find = Detector.load(sys.argv[1], threshold=0.1)
pipeline = Pipeline(find, Crop(height=16, width=24), sys.argv[2], motion=Motion(), every=2)
save(pipeline, sys.argv[4], frames[:4])
again = load(sys.argv[4])
print(sum(len(again(frame)) for frame in frames))
"""


def test_a_device_needs_no_pytorch(detector: Path, boxes: Path, tmp_path: Path):
    model = mean_model(tmp_path / "mean.onnx", "n")
    files = (detector / "model.penjing", model, boxes.parent, tmp_path / "gate.bundle")
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME_ONLY, *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_new_run_forgets_the_last():
    pipeline = Pipeline(Bright((10, 10)), every=100)
    assert [len(f) for f in pipeline.run([frame((10, 10))])] == [1]
    assert [len(f) for f in pipeline.run([frame()])] == [0]


def test_frames_may_change_their_size():
    detector = Bright((10, 10))
    pipeline = Pipeline(detector, every=2, motion=Motion())
    small = frame((10, 10))
    larger = small.repeat(2, axis=0).repeat(2, axis=1)
    detector.places = ((20, 20),)
    sizes = [small, larger, small]
    boxes = []
    for picture in sizes:
        detector.places = ((20, 20),) if picture is larger else ((10, 10),)
        ((item,)) = pipeline(picture)
        boxes.append(item.box[:2])
    assert boxes == [(10, 10), (20, 20), (10, 10)] and detector.calls == 3


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 4), (48, 64, 1), (0, 64, 3)])
def test_other_frames_are_refused(shape: tuple):
    with pytest.raises(PenjingError, match="expected uint8"):
        Pipeline(Bright())(np.zeros(shape, np.uint8))
    with pytest.raises(PenjingError, match="float32"):
        Pipeline(Bright())(np.zeros((8, 8, 3), np.float32))  # type: ignore[arg-type]


def test_a_file_that_does_not_fit_the_crop_is_refused_at_once(tmp_path: Path):
    path = mean_model(tmp_path / "mean.onnx", "n")
    grey = Crop(height=16, width=24, channels=1)
    with pytest.raises(PenjingError, match=r"but the crop makes \[N, 1"):
        Pipeline(Bright(), grey, path)


def test_a_module_that_gives_several_outputs_is_named():
    class Two(nn.Module):
        def forward(self, crops: torch.Tensor) -> tuple:
            return crops, crops

    with pytest.raises(PenjingError, match="Two gives a tuple"):
        Pipeline(Bright((10, 10)), CROP, Two())(frame((10, 10)))


def test_model_and_crop_belong_together():
    for crop, model in ((CROP, None), (None, Counting())):
        with pytest.raises(PenjingError, match="needs both"):
            Pipeline(Bright(), crop, model)
    with pytest.raises(PenjingError, match="every=0"):
        Pipeline(Bright(), every=0)


def test_a_module_is_left_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1)).train()
    (item,) = Pipeline(Bright((10, 10)), CROP, model)(frame((10, 10)))
    assert torch.allclose(torch.from_numpy(item.output), torch.ones(3, 1, 1), atol=1e-5)
