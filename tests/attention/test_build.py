"""From boxes to files: the input fits the objects, the card tells what the file does."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from penjing import PenjingError, attention, container
from penjing.attention import build
from penjing.attention.decoding import Decoding, Threshold
from penjing.attention.pixel_input import PixelInput
from penjing.models.heat_map import FAMILY, HeatMapNet, member
from penjing.targets.onnxruntime.export import export
from penjing.tasks import coco, detection_metrics
from penjing.tasks.coco import Annotated
from penjing.techniques.quantize import quantize


def images(width: int, height: int, *sizes: tuple[float, float]) -> list[Annotated]:
    boxes = np.array(
        [[0.1, 0.1, 0.1 + w / width, 0.1 + h / height, 1] for w, h in sizes], np.float32
    )
    return [Annotated(Path("a.png"), boxes, width, height)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((200, 100), (64, 64)), ((40, 20), (96, 144)), ((20, 10), (192, 320)), ((4, 2), (192, 320))],
)
def test_the_input_is_as_small_as_the_objects_allow(size: tuple, expected: tuple):
    height, width = build.input_size(images(640, 360, size))
    assert (height, width) == expected
    if expected != (192, 320):
        assert min(size[0] * width / 640, size[1] * height / 360) >= build.SMALLEST_OBJECT


def test_an_upright_camera_has_an_upright_input():
    height, width = build.input_size(images(360, 640, (20, 10)))
    assert (height, width) == (320, 192)


def test_the_card_is_of_the_file(detector: Path):
    card = json.loads((detector / "card.json").read_text())
    assert card["packed_bytes"] == (detector / "model.penjing").stat().st_size <= 12_000
    figures = card["figures"]
    assert figures["AP50"] == pytest.approx(card["score"])
    assert figures["recall at 0.1 false positives an image"] > 0.5
    threshold = attention.Detector.load(detector / "model.onnx").threshold
    assert threshold == pytest.approx(figures["threshold"], abs=1e-4)
    assert {layer["format"] for layer in card["layers"] if layer["macs"]} == {"int8"}


def test_the_threshold_is_the_files_own(detector: Path, boxes: Path):
    """On the validation images the file has the false positives its threshold was set for."""
    splits = build._read({"train": (boxes, None)}, seed=0)
    figures = json.loads((detector / "card.json").read_text())["figures"]
    name = "recall at 0.1 false positives an image"
    assert figures["recall at the threshold"] == figures[name]
    assert figures["false positives an image at the threshold"] <= 0.1 * len(splits["validation"])


def test_grey_images_get_a_grey_detector(boxes: Path, tmp_path: Path):
    images = coco.read(boxes)
    assert not build.all_grey(images)
    for image in images[:3]:
        pixels = cv2.imread(str(image.path), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(tmp_path / image.path.name), pixels)
    grey = [Annotated(tmp_path / i.path.name, i.boxes, i.width, i.height) for i in images[:3]]
    assert build.all_grey(grey)


def test_the_same_call_takes_what_is_there(detector: Path, boxes: Path):
    before = {p: p.stat().st_mtime for p in (detector / "cache").rglob("*.safetensors")}
    card = attention.train(boxes, folder=detector, budget=12_000, epochs=25)
    assert {p: p.stat().st_mtime for p in (detector / "cache").rglob("*.safetensors")} == before
    assert card.packed_bytes == (detector / "model.penjing").stat().st_size


def test_images_without_any_box_are_refused(tmp_path: Path, boxes: Path):
    document = json.loads(boxes.read_text())
    document["annotations"] = []
    (tmp_path / "none.json").write_text(json.dumps(document))
    with pytest.raises(PenjingError, match="have no boxes at all"):
        attention.train(tmp_path / "none.json", boxes.parent, folder=tmp_path)


def test_a_budget_that_no_detector_meets(tmp_path: Path, boxes: Path):
    with pytest.raises(PenjingError, match="too small for a detector"):
        attention.train(boxes, folder=tmp_path, budget=5_000)


def test_splits_do_not_share_images(boxes: Path):
    splits = build._read({"train": (boxes, None)}, seed=0)
    names = {name: {image.path for image in part} for name, part in splits.items()}
    assert not names["train"] & names["validation"]
    assert names["train"] | names["validation"] == {image.path for image in coco.read(boxes)}


@pytest.mark.parametrize(
    "budget", [pytest.param(b, marks=[pytest.mark.slow] if b >= 100_000 else []) for b in FAMILY]
)
def test_every_member_of_the_family_fits_its_name(budget: int, tmp_path: Path, boxes: Path):
    """With random weights, which cannot be packed better than trained ones."""
    splits = build._read({"train": (boxes, None)}, seed=0)
    task = build.task_of(splits, 64, 96, 3)
    assert task.preprocessing.size == tuple(task.example.shape[2:]) == (64, 96)
    torch.manual_seed(0)
    net = quantize(HeatMapNet(member(budget, 64, 96)).eval(), task, calibration=8)
    build.align_pixels(net)
    finish = [Decoding(), PixelInput(), Threshold(0.5)]
    path = tmp_path / "model.onnx"
    export(net, task.example, path, calibration=task.calibration(8), finish=finish)
    assert container.pack(path, tmp_path / "model.penjing") <= budget


def test_a_larger_budget_gives_a_larger_net():
    counts = [
        sum(p.numel() for p in HeatMapNet(member(budget, 64, 64)).parameters()) for budget in FAMILY
    ]
    assert counts == sorted(counts)
    assert member(50_000, 64, 64) == member(45_000, 64, 64)


class SeesOneBox(torch.nn.Module):
    """Takes the box of 2 x 2 cells around the centre of cell (5, 10) for an object, ever surer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = torch.zeros(len(image), 5, 24, 24)
        maps[:, 0] = -20.0
        maps[:, 0, 5, 10] = torch.arange(self.seen, self.seen + len(image)) / 10
        self.seen += len(image)
        return maps


def test_hard_negatives_are_the_surest_that_show_no_object(boxes: Path):
    known = coco.read(boxes)
    task = build.task_of({"train": known}, 96, 96, 3)
    x, y = 10.5 / 24, 5.5 / 24
    expected = np.array([x - 1 / 24, y - 1 / 24, x + 1 / 24, y + 1 / 24])
    clear = [
        not len(image.boxes)
        or detection_metrics.overlaps(expected[None], image.boxes[:, :4]).max() <= 0.1
        for image in known
    ]
    assert not all(clear)
    found = build.hard_negatives(SeesOneBox(), task)
    # The other 63 of each image's 64 slots have scores of about e-20.
    assert [any(np.allclose(box, expected, atol=1e-5) for box in part) for part in found] == clear
    assert sum(map(len, found)) <= len(known)


def test_at_most_one_hard_negative_an_image_on_average(
    boxes: Path, monkeypatch: pytest.MonkeyPatch
):
    known = coco.read(boxes)
    task = build.task_of({"train": known}, 96, 96, 3)
    clear = [i for i, part in enumerate(build.hard_negatives(SeesOneBox(), task)) if len(part)]
    monkeypatch.setattr(build, "HARD_NEGATIVES", 0.25)
    found = build.hard_negatives(SeesOneBox(), task)
    assert [i for i, part in enumerate(found) if len(part)] == clear[-12:]
