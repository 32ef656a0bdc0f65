import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, features

from penjing.errors import PenjingError
from penjing.tasks import Preprocessing, image_files
from penjing.tasks.image_files import eight_bits, listing, read

RAMP = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))


def tiff(values: np.ndarray, photometric: int = 1, kind: int = 1, bits: int | None = None) -> bytes:
    """An uncompressed grey TIFF, little-endian, with the tags that Pillow's own writer cannot set."""
    height, width = values.shape[0], values.shape[1]
    data = values.tobytes()
    bits = bits or 8 * values.itemsize
    width = width if bits != 12 else width * 8 // 12
    tags = {
        **{256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 120 + 4},
        **{277: 1, 278: height, 279: len(data), 339: kind},
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def twelve_bits(values: np.ndarray) -> np.ndarray:
    """Values to 4095 ``[h, w]`` packed two to three bytes, uint8 ``[h, 3 w / 2]``."""
    even, odd = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1)
    return packed.reshape(len(values), -1).astype(np.uint8)


def pillow(pixels: np.ndarray, **options: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


DEEP = RAMP.astype(np.uint16) * 257
TWELVE = np.round(RAMP.astype(float) / 255 * 4095).astype(np.uint16)
COLOUR = np.stack([DEEP, DEEP[::-1], DEEP.T], -1)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pillow(DEEP, format="PNG"), id="16-bit PNG"),
        pytest.param(pillow(DEEP, format="TIFF"), id="16-bit TIFF"),
        pytest.param(pillow(DEEP.astype(">u2"), format="TIFF"), id="16-bit big-endian TIFF"),
        pytest.param(tiff(65535 - DEEP, photometric=0), id="16-bit TIFF, white is 0"),
        pytest.param(tiff(twelve_bits(TWELVE), bits=12), id="12-bit TIFF"),
        pytest.param(pillow((RAMP / 255).astype(np.float32), format="TIFF"), id="float TIFF"),
        pytest.param(
            tiff((1 - RAMP / 255).astype(np.float32), photometric=0, kind=3),
            id="float TIFF, white is 0",
        ),
        pytest.param(b"P5 32 32 65535\n" + DEEP.astype(">u2").tobytes(), id="16-bit PGM"),
        pytest.param(b"P5 32 32 4095\n" + TWELVE.astype(">u2").tobytes(), id="12-bit PGM"),
        pytest.param(cv2.imencode(".jp2", DEEP)[1].tobytes(), id="16-bit JPEG 2000"),
    ],
)
def test_deep_grey_images_are_scaled_to_8_bits(tmp_path, data):
    (tmp_path / "deep").write_bytes(data)
    found = np.asarray(eight_bits(read(tmp_path / "deep"), "L", "x")).astype(int)
    # JPEG 2000 loses a little.
    assert np.abs(found - RAMP).max() <= (1 if b"ftypjp2" in data else 0)


@pytest.mark.parametrize("ending", [".png", ".tif", ".ppm"])
def test_deep_colours_keep_their_upper_bits(tmp_path, ending):
    cv2.imwrite(str(tmp_path / f"deep{ending}"), COLOUR[..., ::-1])
    found = np.asarray(eight_bits(read(tmp_path / f"deep{ending}"), "RGB", "x"))
    assert np.array_equal(found, COLOUR >> 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pillow(DEEP.astype(np.int32), format="TIFF"), "signed integers of 32 bits"),
        (tiff(DEEP.astype(np.uint32)), "integers of 32 bits"),
        (tiff(RAMP.astype(np.int8), kind=2), "signed integers of 8 bits"),
        (tiff(DEEP.astype(np.int16), kind=2), "signed integers of 16 bits"),
        (pillow(RAMP.astype(np.float32), format="TIFF"), "floats from 0 to 255, expected 0 to 1"),
        (pillow(np.full((4, 4), np.nan, np.float32), format="TIFF"), "floats from nan"),
        (tiff(RAMP / 255, kind=3), "format or depth is not known"),
        (cv2.imencode(".jp2", COLOUR)[1].tobytes(), "16 bits a channel"),
        (b"", "it is empty"),
        (b"no image", "format or depth is not known"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "format or depth is not known"),
        (pillow(RAMP, format="PNG")[:60], "truncated"),
    ],
)
def test_what_cannot_be_scaled_is_rejected_by_name(tmp_path, data, words):
    path = tmp_path / "scan.tif"
    path.write_bytes(data)
    plain = Preprocessing(size=8, mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(PenjingError, match=words) as caught:
        plain.pixels(read(path), str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_pixels_of_arrays_are_scaled_or_rejected_too():
    plain = Preprocessing(size=32, channels=1, mean=(0,), std=(1,))
    assert np.array_equal(plain.pixels(Image.fromarray(DEEP))[0], RAMP)
    with pytest.raises(PenjingError, match="The image: has integers of 32 bits"):
        plain.pixels(Image.fromarray(DEEP.astype(np.int32)))


def test_bits_that_are_unused_are_counted(tmp_path):
    values = {"deep": DEEP, "dim": TWELVE, "dimmer": TWELVE // 4}
    for name, pixels in values.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    deep, dim, dimmer = (tmp_path / f"{name}.png" for name in values)
    twelve = tmp_path / "twelve.tif"
    twelve.write_bytes(tiff(twelve_bits(TWELVE), bits=12))
    assert image_files.unused_bits([dim, dimmer]) == 4
    assert image_files.unused_bits([dimmer]) == 6
    assert image_files.unused_bits([dim, deep]) == 0
    assert image_files.unused_bits([twelve]) == 0


def test_huge_images_are_rejected_by_name(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.new("L", (100, 100)).save(path)
    thin = Preprocessing(size=224, resize=256, channels=1, mean=(0,), std=(1,))
    with pytest.raises(PenjingError, match="thin: is 1 x 9000 pixels"):
        thin.pixels(Image.new("L", (9000, 1)), "thin")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(PenjingError, match=r"huge\.png: has more than 4,000 pixels"):
        read(path)


def with_alpha(mode: str) -> Image.Image:
    """Red, of which the lower half is transparent."""
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((200, 0, 0, 0), (0, 4, 8, 8))
    if mode != "P":
        return image.convert(mode)
    indexed = Image.fromarray(np.repeat(np.uint8([0, 1]), 32).reshape(8, 8)).convert("P")
    indexed.putpalette([200, 0, 0, 200, 0, 0])
    indexed.info["transparency"] = b"\xff\x00"
    return indexed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (200, 0, 0)), ("LA", (60, 60, 60)), ("P", (200, 0, 0))]
)
def test_alpha_is_dropped_and_colours_stand(tmp_path, mode, colour):
    """As torchvision's reader of image folders does."""
    with_alpha(mode).save(tmp_path / "alpha.png")
    found = np.asarray(eight_bits(read(tmp_path / "alpha.png"), "RGB", "x"))
    assert found.shape == (8, 8, 3) and (found == colour).all()


def test_colours_without_conversion_are_rejected_by_name():
    with pytest.raises(PenjingError, match="x: has colours of mode La"):
        eight_bits(Image.new("La", (4, 4)), "RGB", "x")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_exif_says(tmp_path, form):
    """Orientation 6: the first row is the right side, https://www.cipa.jp/std/documents/e/DC-008.pdf."""
    stored = Image.new("L", (40, 16), 0)
    stored.paste(255, (0, 0, 40, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned"
    stored.convert("RGB").save(path, form, exif=exif)
    found = np.asarray(eight_bits(read(path), "L", "x"))
    assert found.shape == (40, 16)
    assert found[:, :7].max() < 64 and found[:, 9:].min() > 192


READ = [".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"]


def test_endings_that_pillow_reads_are_found_and_others_counted(tmp_path):
    here = [*READ, ".JPG", ".jp2", *([".avif"] if features.check("avif") else [])]
    forms = Image.registered_extensions()
    for index, ending in enumerate(here):
        path = tmp_path / f"{index}{ending}"
        Image.new("RGB", (4, 4), (0, 0, 255)).save(path, forms[ending.lower()])
    deeper = tmp_path / "more" / "yet"
    deeper.mkdir(parents=True)
    (tmp_path / "more" / "link").symlink_to(tmp_path)
    Image.new("RGB", (4, 4)).save(deeper / "below.png")
    for name in (".DS_Store", "._1.jpg", "a.txt", "b.TXT", "c", "d.eps"):
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "copy.jpg").touch()
    found = listing(tmp_path)
    assert {path.name for path in found.images} == {
        *(f"{index}{ending}" for index, ending in enumerate(here)),
        "below.png",
    }
    assert found.others == {
        **{"hidden": 3, ".txt": 2, "without an ending": 1, ".eps": 1, "link to a folder": 1}
    }
    for path in found.images:
        assert eight_bits(read(path), "RGB", "x").size == (4, 4)


def test_formats_of_plugins_are_read_once_registered(tmp_path, monkeypatch):
    (tmp_path / "a.heic").touch()
    assert listing(tmp_path).others == {".heic": 1}
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert listing(tmp_path).images == [tmp_path / "a.heic"]


def test_a_wrong_ending_does_not_matter(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "photo.jpg", "PNG")
    assert np.array_equal(np.asarray(read(tmp_path / "photo.jpg")), RAMP)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("PPM", {}),
        ("JPEG2000", {}),
    ],
)
def test_no_part_of_a_file_passes_for_the_whole(tmp_path: Path, form: str, options: dict):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    data = pillow(pixels, format=form, **options)
    (tmp_path / "x").write_bytes(data)
    assert image_files.read(tmp_path / "x").size == (20, 24)
    for share in (0.02, 0.3, 0.6, 0.9):
        (tmp_path / "x").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(PenjingError, match="x: cannot be read as an image"):
            image_files.read(tmp_path / "x")


def test_damaged_files_raise_nothing_else(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "JPEG2000"):
        data = pillow(RAMP, format=form)
        for _ in range(25):
            damaged = bytearray(data)
            for place in torch.randint(len(data), (4,), generator=generator).tolist():
                damaged[place] ^= 0xA5
            (tmp_path / "x").write_bytes(damaged)
            try:
                eight_bits(image_files.read(tmp_path / "x"), "RGB", "x")
            except PenjingError as error:
                assert "\n" not in str(error)
