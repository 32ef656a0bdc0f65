import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from penjing.tasks import Preprocessing


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(20, 90), height=st.integers(20, 90), resize=st.integers(24, 40))
def test_is_torchvisions_preset(width, height, resize):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = Preprocessing(size=24, resize=resize, mean=mean, std=std)
    theirs = ImageClassification(
        crop_size=24,
        resize_size=resize,
        mean=mean,
        std=std,
        interpolation=InterpolationMode.BILINEAR,
    )
    image = picture(width, height)
    found = ours.normalize(ours.pixels(image)[None])
    torch.testing.assert_close(found[0], theirs(image), atol=1e-6, rtol=1e-6)


def test_image_of_the_right_size_is_left_alone():
    image = picture(32, 32)
    pixels = Preprocessing(size=32, mean=(0,) * 3, std=(1,) * 3).pixels(image)
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_takes_every_kind_of_image(mode, channels):
    preprocessing = Preprocessing(
        size=8, channels=channels, mean=(0,) * channels, std=(1,) * channels
    )
    pixels = preprocessing.pixels(picture(10, 12).convert(mode))
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.5,)}, {"std": (0, 1, 1)}, {"resize": 4}, {"channels": 2}, {"sise": 3}]
)
def test_refuses_inconsistent_settings(wrong):
    with pytest.raises(ValidationError):
        Preprocessing(**({"size": 8, "mean": (0,) * 3, "std": (1,) * 3} | wrong))


def test_survives_json():
    preprocessing = Preprocessing(size=8, mean=(0.1,) * 3, std=(1,) * 3)
    assert Preprocessing.model_validate_json(preprocessing.model_dump_json()) == preprocessing
