"""A bundle is the pipeline again; a file that is none is refused with one sentence."""

import contextlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penjing import PenjingError, attention
from penjing.attention import Crop, Detector, Motion, Pipeline, bundle
from penjing.container.streams import number
from penjing.tasks import coco
from penjing.tasks.frames import read


@pytest.fixture(scope="module")
def pipeline(detector: Path) -> Pipeline:
    crop = Crop(height=16, width=24, left=0.1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    find = Detector.load(detector / "model.penjing", threshold=0.3)
    return Pipeline(find, crop, model, motion=Motion(heartbeat=9), every=2)


@pytest.fixture(scope="module")
def saved(pipeline: Pipeline, boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = [read(image.path) for image in coco.read(boxes)[:8]]
    path = tmp_path_factory.mktemp("bundle") / "gate.bundle"
    attention.save(pipeline, path, frames)
    return path


def test_a_bundle_does_what_the_pipeline_did(pipeline: Pipeline, saved: Path, boxes: Path):
    again = attention.load(saved)
    assert (again.every, again.motion, again.crops) == (2, pipeline.motion, pipeline.crops)
    frames = [read(image.path) for image in coco.read(boxes)[:6]]
    seen = 0
    for one, other in zip(pipeline.run(frames), again.run(frames), strict=True):
        assert [item.box for item in one] == [item.box for item in other]
        for mine, theirs in zip(one, other, strict=True):
            assert np.allclose(mine.output, theirs.output, atol=1e-4)
            seen += 1
    assert seen > 0


def test_a_loaded_bundle_can_be_saved_again(saved: Path, boxes: Path, tmp_path: Path):
    frames = [read(image.path) for image in coco.read(boxes)[:2]]
    attention.save(attention.load(saved), tmp_path / "again.bundle", frames)
    with zipfile.ZipFile(saved) as one, zipfile.ZipFile(tmp_path / "again.bundle") as other:
        for name in ("pipeline.json", "detector.penjing", "model.onnx"):
            assert one.read(name) == other.read(name)


def test_there_must_be_frames_to_measure_on(detector: Path, tmp_path: Path):
    find = Detector.load(detector / "model.onnx")
    with pytest.raises(PenjingError, match="at least one"):
        attention.save(Pipeline(find), tmp_path / "a.bundle", [])


def test_the_card_is_measured(saved: Path):
    card = bundle.card(saved)
    assert card["detector_bytes"] < 12_000 and card["model_bytes"] > 0
    parts = card["latencies"]
    assert {"detector", "motion gate", "crop and model, one object", "still frame"} <= set(parts)
    assert any(name.startswith("frame between detections") for name in parts)
    assert all(0 < part["p10_ms"] <= part["median_ms"] <= part["p90_ms"] for part in parts.values())


def test_a_python_function_cannot_be_saved(detector: Path, tmp_path: Path):
    find = Detector.load(detector / "model.onnx")
    for crop, model in (
        (Crop(height=8, width=8), lambda crops: crops),
        (Crop(height=8), nn.AdaptiveAvgPool2d(1)),
    ):
        with pytest.raises(PenjingError, match="can be saved"):
            attention.save(Pipeline(find, crop, model), tmp_path / "a.bundle", [])


def altered(saved: Path, target: Path, **members: bytes | None) -> Path:
    with zipfile.ZipFile(saved) as archive:
        parts: dict = {name: archive.read(name) for name in archive.namelist()}
    parts |= {name.replace("__", "."): content for name, content in members.items()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in parts.items():
            if content is not None:
                archive.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../escape": b"x"}, r"no bundle: its member '\.\./escape'"),
        ({"/etc/passwd": b"x"}, r"no bundle: its member '/etc/passwd'"),
        ({"folder/": b""}, r"no bundle: its member 'folder/'"),
        ({"detector__penjing": None}, "no bundle: it holds no detector.penjing"),
        ({"model__onnx": None}, "missing"),
        ({"pipeline__json": b"{"}, "pipeline.json"),
        ({"pipeline__json": b'{"every": 0}'}, "pipeline.json"),
        ({"pipeline__json": b" " * 10**6}, r"member pipeline.json declares 1,000,000 bytes"),
        ({"detector__penjing": b"junk"}, "damaged bundle: detector.penjing cannot be unpacked"),
        ({"model__onnx": b"junk"}, "damaged"),
    ],
)
def test_hostile_bundles_are_refused(saved: Path, tmp_path: Path, members: dict, message: str):
    path = altered(saved, tmp_path / "bad.bundle", **members)
    with pytest.raises(PenjingError, match=message):
        attention.load(path)


def test_compressed_members_are_refused(saved: Path, tmp_path: Path):
    path = tmp_path / "bomb.bundle"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bad:
        for name in archive.namelist():
            bad.writestr(name, archive.read(name))
    with pytest.raises(PenjingError, match=r"member pipeline.json is compressed"):
        attention.load(path)


def declaring(size: int) -> bytes:
    """A packed file's head that declares an ONNX file of ``size`` bytes."""
    return b"PNJG\x02" + number(size) + bytes(8) + b"\x00"


@pytest.mark.parametrize("name", ["detector.penjing", "model.penjing"])
def test_members_are_unpacked_within_a_limit(saved: Path, tmp_path: Path, name: str):
    """A few bytes that declare gigabytes take no memory."""
    with zipfile.ZipFile(saved) as archive:
        plan = json.loads(archive.read("pipeline.json")) | {"model": "model.penjing"}
        packed = archive.read("detector.penjing")
    members = {"detector.penjing": packed, "model.penjing": packed} | {name: declaring(2**30 + 1)}
    members = {key.replace(".", "__"): value for key, value in members.items()}
    plans = {"pipeline__json": json.dumps(plan).encode(), "model__onnx": None}
    path = altered(saved, tmp_path / "bad.bundle", **members, **plans)
    with pytest.raises(PenjingError, match=f"{name} .* declares {2**30 + 1} bytes"):
        attention.load(path)


@pytest.mark.parametrize("field", ["file_size", "compress_size"])
def test_members_that_declare_other_sizes_are_named(saved: Path, tmp_path: Path, field: str):
    """In the archive's directory, which is what a reader goes by."""
    path = tmp_path / "bad.bundle"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(path, "w") as bad:
        for name in archive.namelist():
            bad.writestr(name, archive.read(name))
        setattr(bad.getinfo("model.onnx"), field, 2**29)
    with pytest.raises(PenjingError, match=r"member model.onnx declares"):
        attention.load(path)


def test_a_member_that_is_there_twice_is_named(saved: Path, tmp_path: Path):
    path = tmp_path / "bad.bundle"
    path.write_bytes(saved.read_bytes())
    with zipfile.ZipFile(path, "a") as bad, pytest.warns(UserWarning):
        bad.writestr("pipeline.json", b"{}")
    with pytest.raises(PenjingError, match=r"member 'pipeline.json' is there twice"):
        attention.load(path)


def test_a_member_whose_bytes_are_another_files_is_named(saved: Path, tmp_path: Path):
    whole = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        at = archive.getinfo("card.json").header_offset
    whole[at + 60] ^= 1
    (tmp_path / "bad.bundle").write_bytes(whole)
    with pytest.raises(PenjingError, match=r"member card.json is damaged \(.*CRC"):
        bundle.card(tmp_path / "bad.bundle")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damage_gives_one_error_or_a_whole_pipeline(saved: Path, tmp_path_factory, data):
    """In a member, behind the archive's own checksums, and anywhere in the archive."""
    path = tmp_path_factory.mktemp("damage") / "bad.bundle"
    with zipfile.ZipFile(saved) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    whole = data.draw(st.booleans())
    name = data.draw(st.sampled_from(sorted(parts)))
    content = bytearray(saved.read_bytes() if whole else parts[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if whole:
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    else:
        altered(saved, path, **{name.replace(".", "__"): bytes(content)})
    with contextlib.suppress(PenjingError):
        attention.load(path)(np.zeros((96, 96, 3), np.uint8))


def test_the_plan_holds_no_code(saved: Path):
    with zipfile.ZipFile(saved) as archive:
        plan = json.loads(archive.read("pipeline.json"))
    assert set(plan) == {"version", "threshold", "every", "motion", "crops", "model"}
