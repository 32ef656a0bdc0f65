"""A trained detector finds what it was trained on; other files are refused."""

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from penjing import PenjingError
from penjing.attention import Detector
from penjing.tasks import coco, detection_metrics
from penjing.tasks.frames import read, to_input


def test_it_finds_the_rectangles(detector: Path, boxes: Path):
    find = Detector.load(detector / "model.penjing")
    images = coco.read(boxes)
    size = np.array([96, 96, 96, 96])
    found = [find(read(image.path)) for image in images]
    recall, _ = detection_metrics.recall_at(
        found, [image.boxes[:, :4] * size for image in images], 0.25
    )
    assert recall > 0.8


def test_boxes_are_in_pixels_of_the_frame(detector: Path, boxes: Path):
    find = Detector.load(detector / "model.onnx", threshold=0.0)
    frame = read(coco.read(boxes)[1].path)
    large = cv2.resize(frame, (192, 288), interpolation=cv2.INTER_NEAREST)
    small, big = find(frame)[0], find(large)[0]
    assert np.allclose(big[:4], small[:4] * [2, 3, 2, 3], atol=8)


def test_the_threshold_decides_what_counts(detector: Path, boxes: Path):
    frame = read(coco.read(boxes)[1].path)
    scores = Detector.load(detector / "model.onnx", threshold=0.0)(frame)[:, 4]
    middle = float(np.median(scores))
    kept = Detector.load(detector / "model.onnx", threshold=middle)(frame)
    assert len(kept) == (scores >= middle).sum() < len(scores)
    assert 0 < Detector.load(detector / "model.onnx").threshold < 1


def test_other_models_are_refused(tmp_path: Path):
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [image], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "relu.onnx")
    with pytest.raises(PenjingError, match="not a detector"):
        Detector.load(tmp_path / "relu.onnx")
    with pytest.raises(PenjingError, match="cannot be read"):
        Detector.load(tmp_path / "none.onnx")


def test_inputs_are_stretched_without_aliasing():
    stripes = np.zeros((90, 160, 3), np.uint8)
    stripes[:, ::2] = 200
    colour, grey = (to_input(stripes, 48, 64, channels) for channels in (3, 1))
    assert colour.shape == (1, 48, 64, 3) and grey.shape == (1, 48, 64, 1)
    assert np.abs(colour.astype(int) - 100).max() <= 25
    flat = np.full((91, 163, 3), 77, np.uint8)
    assert (to_input(flat, 64, 96, 3) == 77).all() and (to_input(flat, 96, 320, 1) == 77).all()
