"""Pictures of traffic signs as a camera sees them, drawn when they are needed: nothing is downloaded.

A sign is drawn flat, turned in space, put in front of a blurred background, and seen through a lens:
another light and colour cast, out of focus or shaken, with noise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CLASSES = [
    "30 km/h",
    "100 km/h",
    "no entry",
    "no stopping",
    "parking",
    "priority",
    "roadworks",
    "stop",
    "warning",
    "yield",
]
RED, BLUE, YELLOW, WHITE, BLACK = "#b3201d", "#1c4f9c", "#e8b70f", "#e8e8e4", "#1c1c1c"
FLAT = 96  # side of a flat sign, pixels
DRAFT = 2  # a picture is drawn so many times larger


def pictures(count: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """``count`` pictures, uint8 ``[count, size, size, 3]``, and their classes, int64 ``[count]``, as
    many of each of ``CLASSES``."""
    dice = np.random.default_rng(seed)
    flat = [_flat(name) for name in CLASSES]
    labels = dice.permutation(np.arange(count) % len(CLASSES))
    return np.stack([_picture(flat[label], size, dice) for label in labels]), labels


def _flat(name: str) -> Image.Image:
    """The sign ``name``, straight from the front, RGBA with ``FLAT`` pixels a side."""
    sign = Image.new("RGBA", (FLAT, FLAT))
    draw = ImageDraw.Draw(sign)
    if name.endswith("km/h"):
        _disc(draw, RED, 46)
        _disc(draw, WHITE, 35)
        _write(draw, name.split()[0], BLACK, 44 if name.startswith("30") else 34)
    elif name == "no entry":
        _disc(draw, RED, 46)
        draw.rectangle((18, 40, 78, 56), WHITE)
    elif name == "no stopping":
        _disc(draw, RED, 46)
        _disc(draw, BLUE, 37)
        draw.line((20, 20, 76, 76), RED, 9)
        draw.line((20, 76, 76, 20), RED, 9)
    elif name == "parking":
        draw.rounded_rectangle((6, 6, 90, 90), 8, BLUE)
        _write(draw, "P", WHITE, 68)
    elif name == "priority":
        _polygon(draw, WHITE, 4, 46, 0)
        _polygon(draw, YELLOW, 4, 34, 0)
    elif name == "stop":
        _polygon(draw, RED, 8, 46, math.pi / 8)
        _write(draw, "STOP", WHITE, 30)
    else:
        turned = math.pi if name == "yield" else 0
        _polygon(draw, RED, 3, 50, turned)
        _polygon(draw, WHITE, 3, 32, turned)
        if name == "warning":
            draw.rectangle((45, 34, 51, 54), BLACK)
            draw.ellipse((44, 58, 52, 66), BLACK)
        elif name == "roadworks":
            draw.polygon([(28, 70), (54, 42), (72, 70)], BLACK)
    return sign


def _disc(draw: ImageDraw.ImageDraw, color: str, radius: int) -> None:
    low, high = FLAT // 2 - radius, FLAT // 2 + radius
    draw.ellipse((low, low, high, high), color)


def _polygon(
    draw: ImageDraw.ImageDraw, color: str, corners: int, radius: int, turned: float
) -> None:
    """A regular polygon with a corner on top where it is not ``turned`` (radians)."""
    angles = [turned + 2 * math.pi * corner / corners for corner in range(corners)]
    middle = FLAT / 2
    points = [(middle + radius * math.sin(a), middle - radius * math.cos(a)) for a in angles]
    draw.polygon(points, color)


def _write(draw: ImageDraw.ImageDraw, text: str, color: str, size: int) -> None:
    font = ImageFont.load_default(size)
    draw.text((FLAT / 2, FLAT / 2), text, color, font, anchor="mm", stroke_width=size // 20)


def _picture(flat: Image.Image, size: int, dice: np.random.Generator) -> NDArray[np.uint8]:
    """``flat`` as a camera sees it, uint8 ``[size, size, 3]``."""
    side = DRAFT * size
    scene = _background(side, dice)
    turned = flat.transform(
        (side, side),
        Image.Transform.PERSPECTIVE,
        _perspective(side, dice),
        Image.Resampling.BILINEAR,
    )
    scene.paste(turned, (0, 0), turned)
    blurred = scene.filter(ImageFilter.GaussianBlur(abs(dice.normal(0, 1.5))))
    pixels = np.asarray(blurred.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    light = dice.uniform(0.3, 1.15) * dice.normal(1, 0.06, 3)
    noise = dice.normal(0, dice.uniform(2, 14), pixels.shape)
    return np.clip(pixels * light + dice.uniform(-10, 30) + noise, 0, 255).astype(np.uint8)


def _background(side: int, dice: np.random.Generator) -> Image.Image:
    """Blurred patches of sky, wall and leaves."""
    coarse = dice.integers(30, 220, (4, 4, 1)) + dice.integers(-30, 30, (4, 4, 3))
    image = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _perspective(side: int, dice: np.random.Generator) -> list[float]:
    """Coefficients, for ``Image.transform``, of a sign anywhere near the middle of a picture."""
    angle, shrunk = dice.normal(0, 0.12), dice.uniform(1.05, 2.2) * FLAT / side
    cos, sin = shrunk * math.cos(angle), shrunk * math.sin(angle)
    stretch = dice.uniform(0.9, 1.4)  # seen from the side it is narrower
    tilt, lean = dice.normal(0, 0.15, 2) / side
    middle = side / 2 + dice.normal(0, 0.06 * side, 2)
    x, y = middle
    return [
        cos * stretch,
        sin,
        FLAT / 2 - cos * stretch * x - sin * y,
        -sin * stretch,
        cos,
        FLAT / 2 + sin * stretch * x - cos * y,
        tilt,
        lean,
    ]
