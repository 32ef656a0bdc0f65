"""``penjing attend`` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penjing import PenjingError
from penjing.attention import build, video
from penjing.cli.main import app
from penjing.tasks import coco
from penjing.tasks.frames import read

CROP = "height: 16\nwidth: 24\n"


@pytest.fixture(scope="module")
def film(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "entry.mp4"
    with video.VideoWriter(path, rate=5.0) as writer:
        for image in coco.read(boxes)[:6]:
            writer.write(read(image.path))
    return path


@pytest.fixture(scope="module")
def crop_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    import torch
    from torch import nn

    from penjing.targets.onnxruntime.export import export

    folder = tmp_path_factory.mktemp("model")
    (folder / "crop.yaml").write_text(CROP)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    export(model, torch.zeros(1, 3, 16, 24), folder / "m.onnx")
    return str(folder / "m.onnx"), str(folder / "crop.yaml")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in ("attend", *words)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_train_prints_the_card(boxes: Path, tmp_path: Path):
    words = ("--data", boxes, "-o", tmp_path, "--budget", "12KB", "--epochs", 1, "--json")
    card = json.loads(run("train", *words))
    assert card["packed_bytes"] == (tmp_path / "model.penjing").stat().st_size
    assert "AP50" in card["figures"]


def test_each_part_has_its_own_folder(
    draw: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Boxes together, images of one name in three folders: each card is of its own part."""
    parts = {}
    for seed, part in enumerate(("train", "validation", "test")):
        draw(tmp_path / part, 4 + 4 * seed, seed=seed)
        (tmp_path / part / "boxes.json").rename(tmp_path / f"{part}.json")
        parts[part] = coco.read(tmp_path / f"{part}.json", tmp_path / part)
    seen = {}

    def stop(splits: dict, *_: object) -> None:
        seen.update(splits)
        raise PenjingError("seen")

    monkeypatch.setattr("penjing.attention.build.task_of", stop)
    files = [word for part in ("validation", "test") for word in (f"--{part}", f"{part}.json")]
    folders = ("--images", "train", "--validation-images", "validation", "--test-images", "test")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PenjingError, match="seen"):
        run("train", "--data", "train.json", *files, *folders, "-o", "out")
    for part, images in parts.items():
        found = [(tmp_path / image.path).resolve() for image in seen[part]]
        assert found == [image.path for image in images]
    with pytest.raises(
        PenjingError, match=r"004.png: no such file, but validation.json lists '004.png'"
    ):
        run("train", "--data", "train.json", *files, "--images", "train", "-o", "out")


def test_help_says_how_long_a_training_is():
    assert build.BATCH == 16
    taken = sum(stage.train.epochs for stage in build.recipe(1600, None, 0).stages) * 100
    assert f"{round(taken):,} steps" in " ".join(run("train", "--help").split())


def test_run_prints_a_line_a_frame(detector: Path, film: Path):
    lines = run("run", "--detector", detector / "model.penjing", film).splitlines()
    assert [json.loads(line)["frame"] for line in lines] == list(range(6))
    assert sum(len(json.loads(line)["found"]) for line in lines) > 0


def test_run_writes_video_and_lines(
    detector: Path, film: Path, crop_model: tuple[str, str], tmp_path: Path
):
    model, crop = crop_model
    files = ("--video", tmp_path / "seen.mp4", "--jsonl", tmp_path / "seen.jsonl")
    words = ("--detector", detector / "model.onnx", "--model", model, "--crop", crop, "--every", 2)
    assert run("run", *words, *files, film) == ""
    lines = (tmp_path / "seen.jsonl").read_text().splitlines()
    outputs = [item["output"] for line in lines for item in json.loads(line)["found"]]
    assert len(lines) == 6 and outputs and all(len(output) == 4 for output in outputs)
    assert len(list(video.read(tmp_path / "seen.mp4"))) == 6


def test_a_bundle_is_written_measured_and_run(
    detector: Path, film: Path, crop_model: tuple[str, str], tmp_path: Path
):
    model, crop = crop_model
    words = ("--detector", detector / "model.penjing", "--model", model, "--crop", crop, "--motion")
    bundle = tmp_path / "gate.bundle"
    card = json.loads(run("bundle", *words, "-o", bundle, "--json", film))
    assert {"detector", "motion gate"} <= set(card["latencies"])
    lines = run("run", "--bundle", bundle, film).splitlines()
    assert len(lines) == 6
    (row,) = json.loads(run("bench", bundle, "--frames", film, "--json"))
    assert row["bytes"] == bundle.stat().st_size and row["latencies"]["detector"]["median_ms"] > 0
    assert "median ms" in run("bench", detector / "model.penjing", "--size", "240x320")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "a.mp4"), "either --detector or --bundle"),
        (("run", "--detector", "d.penjing", "--model", "m.onnx", "a.mp4"), "--crop together"),
        (("run", "--bundle", "b", "--every", "2", "a.mp4"), "its own settings"),
        (("bench", "DETECTOR", "--size", "wide"), "height x width"),
        (("train", "--data", "no.json", "-o", "OUT"), r"no\.json"),
    ],
)
def test_what_is_wrong_is_said(words: tuple, message: str, detector: Path, tmp_path: Path):
    known = {"DETECTOR": detector / "model.penjing", "OUT": tmp_path}
    with pytest.raises(PenjingError, match=message):
        run(*(known.get(word, word) for word in words))


def test_a_crop_with_an_unknown_setting_is_named(detector: Path, film: Path, tmp_path: Path):
    (tmp_path / "crop.yaml").write_text("height: 16\nmargin: 3\n")
    words = ("--detector", detector / "model.onnx", "--model", "m.onnx")
    with pytest.raises(PenjingError, match="margin"):
        run("run", *words, "--crop", tmp_path / "crop.yaml", film)
