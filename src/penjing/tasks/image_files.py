"""Image files: find them, decode and turn them upright, convert them to 8 bits a channel."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from penjing.errors import PenjingError

# Pillow's other formats hold no photographs, run a program (EPS), or match any file (TGA).
FORMATS = (
    *("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "MPO", "JPEG2000", "AVIF", "QOI"),
    *("HEIF", "JXL"),  # where a plugin is registered
)
DEEP = "scale its values and save it with 8 or 16 bits a channel"
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF files."""


class Listing(NamedTuple):
    """The files in a folder and below it."""

    images: list[Path]
    """Image files, sorted."""
    others: Counter[str]
    """Number of files that are not read, by their ending."""


def listing(folder: Path) -> Listing:
    """List the files below ``folder``: images are those with an ending that Pillow can read here.

    Names that begin with a dot, and links to other folders, are not read.

    Raises:
        PenjingError: a folder cannot be read.
    """
    Image.init()
    endings = {end for end, form in Image.registered_extensions().items() if form in FORMATS}
    images, others = [], Counter[str]()
    for place, folders, names in os.walk(folder, onerror=_cannot_be_read):
        hidden = any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
        others["link to a folder"] += sum(Path(place, name).is_symlink() for name in folders)
        for name in names:
            path = Path(place, name)
            if hidden or name.startswith("."):
                others["hidden"] += 1
            elif path.suffix.lower() in endings:
                images.append(path)
            else:
                others[path.suffix.lower() or "without an ending"] += 1
    return Listing(sorted(images), +others)


def read(path: Path) -> Image.Image:
    """Read the (first) picture in a file, decoded and turned as its EXIF orientation says.

    Raises:
        PenjingError: the file cannot be read, is broken, or is larger than Pillow's limit.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        # From memory, because Pillow reads small files slowly, a few bytes at a time.
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data), formats=known)
        ImageOps.exif_transpose(image, in_place=True)
    except Image.DecompressionBombError as error:
        raise PenjingError(
            f"{path}: has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller."
        ) from error
    except UnidentifiedImageError as error:
        reason = "its format or depth is not known" if data else "it is empty"
        raise PenjingError(
            f"{path}: cannot be read as an image ({reason}); repair or remove the file, or save it "
            "as PNG or JPEG with 8 bits a channel."
        ) from error
    # Pillow's decoders raise nearly everything on broken files.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PenjingError(
            f"{path}: cannot be read as an image ({reason}); repair or remove the file."
        ) from error
    if image.format == "JPEG2000":
        _check_jpeg2000(image, data, path)
    return image


def eight_bits(image: Image.Image, mode: Literal["L", "RGB"], name: str) -> Image.Image:
    """Convert ``image`` to grey (``L``) or colour, 8 bits a channel; errors call it ``name``.

    16 bits are divided by 257, 12 bits scaled from 4095, floats multiplied by 255. Colour images of
    16 bits come from Pillow with the upper 8. An alpha channel or transparent palette entry is
    dropped and its colour stays, as for torchvision's and timm's readers.

    Raises:
        PenjingError: integers whose white is not known (32-bit or signed), floats outside [0, 1],
            colours that cannot be converted.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else None
    if tags and 2 in tags.get(SAMPLE_FORMAT, ()):
        kind = f"signed integers of {tags.get(BITS, (1,))[0]} bits"
        raise PenjingError(f"{name}: has {kind}, whose white is not known; {DEEP}.")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(_scaled(image, tags, name))
    # Pillow warns when it drops transparency that is given for each entry of a palette.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise PenjingError(
            f"{name}: has colours of mode {image.mode}, which Pillow does not turn into {mode}; "
            "save it as RGB with 8 bits a channel."
        ) from error


def unused_bits(paths: Sequence[Path]) -> int:
    """Count the upper bits that are 0 in all 16-bit grey images in ``paths``; 0 if one has another
    depth. Cameras of 10 or 12 bits write such files, which look nearly black.

    Raises:
        PenjingError: a file cannot be read.
    """
    largest = 0
    for path in paths:
        image = read(path)
        if _white(image) != 65535:
            return 0
        largest = max(largest, int(np.asarray(image).max()))
    return 16 - largest.bit_length() if largest else 0


def _white(image: Image.Image) -> float | None:
    """Return the value of white in a grey image of more than 8 bits; None if it is unknown."""
    if image.mode == "F":
        return 1.0
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        return 2.0 ** image.tag_v2.get(BITS, (16,))[0] - 1
    # Pillow makes 32-bit integers of the 16 bits of PPM files, and before version 11 of PNG files.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535.0
    return None


def _scaled(image: Image.Image, tags: ImageFileDirectory_v2 | None, name: str) -> np.ndarray:
    """Scale grey values of more than 8 bits to uint8 ``[H, W]``."""
    white = _white(image)
    if white is None:
        raise PenjingError(f"{name}: has integers of 32 bits, whose white is not known; {DEEP}.")
    values = np.asarray(image, np.float32)
    if not (values.min() >= 0 and values.max() <= white):
        kind = "floats" if image.mode == "F" else "integers"
        raise PenjingError(
            f"{name}: has {kind} from {values.min():g} to {values.max():g}, expected 0 to {white:g}; "
            f"{DEEP}."
        )
    if tags and tags.get(PHOTOMETRIC) == 0:  # white is 0, which Pillow handles for 8 bits only
        values = white - values
    return np.rint(values * (255 / white)).astype(np.uint8)


def _check_jpeg2000(image: Image.Image, data: bytes, path: Path) -> None:
    """Reject deep colour: Pillow rounds it to 256, which wraps around, so that white is black."""
    start = data.find(b"\xff\x4f\xff\x51")  # The component's depth less one, ISO/IEC 15444-1 A.5.1.
    depth = (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 8
    if depth > 8 and not image.mode.startswith("I;16"):
        raise PenjingError(
            f"{path}: is a JPEG 2000 file with {depth} bits a channel, of which Pillow reads grey "
            "only; save it with 8 bits a channel."
        )


def _cannot_be_read(error: OSError) -> NoReturn:
    raise PenjingError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); change its permissions."
    ) from error
