"""Frames from images, folders and videos; results as video and as lines of JSON."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from penjing import PenjingError
from penjing.attention import Found, video


def frames(count: int) -> list[np.ndarray]:
    return [np.full((48, 64, 3), (20 * i, 100, 200 - 20 * i), np.uint8) for i in range(count)]


def film(path: Path, count: int = 6) -> Path:
    with video.VideoWriter(path, rate=10.0) as writer:
        for frame in frames(count):
            writer.write(frame)
    return path


def test_a_video_comes_back_frame_by_frame(tmp_path: Path):
    shots = list(video.read(film(tmp_path / "a.mp4")))
    assert [shot.index for shot in shots] == list(range(6))
    assert [shot.seconds for shot in shots] == pytest.approx([i / 10 for i in range(6)])
    for shot, frame in zip(shots, frames(6), strict=True):
        assert np.abs(shot.frame.astype(int) - frame).mean() < 12


def test_a_folder_is_read_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, shade in (("b.png", 200), ("a.png", 100), ("c.txt", 0)):
        if name.endswith("png"):
            cv2.imwrite(str(tmp_path / name), np.full((8, 8, 3), shade, np.uint8))
        else:
            (tmp_path / name).write_text("no image")
    shots = list(video.read(tmp_path))
    assert [Path(shot.source).name for shot in shots] == ["a.png", "b.png"]
    assert [int(shot.frame[0, 0, 0]) for shot in shots] == [100, 200]
    assert "1 not read" in capsys.readouterr().err


def test_images_are_read_as_red_green_blue(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "red.png"), np.full((4, 4, 3), (0, 0, 255), np.uint8))
    (shot,) = video.read(tmp_path / "red.png")
    assert shot.frame[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PenjingError, match=r"broken\.mp4"):
        list(video.read(path))


def test_a_broken_image_and_an_empty_folder(tmp_path: Path):
    with pytest.raises(PenjingError, match="has no images"):
        video.read(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"broken")
    with pytest.raises(PenjingError, match=r"a\.jpg: cannot be read"):
        list(video.read(tmp_path))


def test_a_frame_of_another_size_is_scaled_to_the_video(tmp_path: Path):
    with video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.write(np.zeros((96, 32, 3), np.uint8))
    assert [shot.frame.shape for shot in video.read(tmp_path / "a.mp4")] == [(48, 64, 3)] * 2


def test_a_video_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(PenjingError, match="cannot be written"):
        video.VideoWriter(tmp_path / "no" / "a.mp4").write(np.zeros((48, 64, 3), np.uint8))


def test_boxes_are_drawn_on_a_copy():
    frame = np.zeros((60, 80, 3), np.uint8)
    picture = video.draw(frame, [Found((20.0, 20.0, 50.0, 40.0), 0.8, 1, "AB1")])
    assert not frame.any() and picture[20, 30].any() and not picture[30, 35].any()


def test_a_line_says_what_was_found():
    shot = video.Shot("gate.mp4", 3, 0.3, 10.0, np.zeros((4, 4, 3), np.uint8))
    large_output = np.eye(300, dtype=np.float32)
    numbers = (np.float32(0.5), float("nan"))
    outputs = [np.array([0.5, 0.25]), large_output, "AB1", None, numbers]
    found = [Found((1.0, 2.0, 3.0, 4.0), 0.5, i, output) for i, output in enumerate(outputs)]
    file = io.StringIO()
    video.write_line(file, shot, found)
    line = json.loads(file.getvalue())
    assert (line["source"], line["frame"], line["seconds"]) == ("gate.mp4", 3, 0.3)
    small, large, text, none, pair = (item["output"] for item in line["found"])
    assert pair == [0.5, None]
    assert small == [0.5, 0.25] and text == "AB1" and none is None
    assert large == {"shape": [300, 300], "argmax": list(range(300))}


@pytest.mark.parametrize(
    "address", ["rtsp://me:secret@127.0.0.1:1/live", "http://127.0.0.1:1/a.jpg"]
)
def test_a_camera_that_is_not_there_is_named_without_its_password(address: str):
    with pytest.raises(PenjingError, match="cannot be opened") as raised:
        list(video.read(address))
    assert "secret" not in str(raised.value) and "127.0.0.1" in str(raised.value)


def test_each_source_starts_anew(tmp_path: Path):
    class Pipeline:
        resets = 0

        def reset(self) -> None:
            self.resets += 1

        def __call__(self, frame: np.ndarray) -> list[Found]:
            return []

    pipeline, seen = Pipeline(), []
    sources = [film(tmp_path / "a.mp4", 3), film(tmp_path / "b.mp4", 2)]
    assert video.watch(sources, pipeline, lambda shot, _: seen.append(shot.index)) == 5
    assert pipeline.resets == 2 and seen == [0, 1, 2, 0, 1]
