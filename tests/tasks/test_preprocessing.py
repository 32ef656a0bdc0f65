import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from penjing.errors import PenjingError
from penjing.tasks import Preprocessing
from penjing.tasks.preprocessing import adapted, parse_size


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


PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def test_a_square_has_one_size_however_it_is_said():
    assert Preprocessing(size=(8, 8), **PLAIN) == Preprocessing(size=8, **PLAIN)
    oblong = Preprocessing(size=(8, 20), **PLAIN)
    assert (oblong.height, oblong.width) == (8, 20)
    assert Preprocessing.model_validate_json(oblong.model_dump_json()) == oblong


@pytest.mark.parametrize("resize", [16, 20])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("higher", "wider"), [(0, 0), (7, 0), (0, 9)])
def test_oblong_inputs_are_timms(resize, times, higher, wider):
    """timm resizes with the image's aspect until it covers the input over ``crop_pct``, then crops."""
    from timm.data import create_transform

    image = picture(times * (resize * 3 // 2 + wider), times * (resize + higher))
    ours = Preprocessing(size=(16, 24), resize=resize, **PLAIN)
    theirs = create_transform(
        (3, 16, 24), interpolation="bilinear", mean=ours.mean, std=ours.std, crop_pct=16 / resize
    )
    torch.testing.assert_close(ours.normalize(ours.pixels(image)[None])[0], theirs(image))


def test_oblong_inputs_are_cut_from_the_middle_without_distortion():
    columns = np.arange(60, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    cropped = Preprocessing(size=(20, 30), resize=40, **PLAIN).pixels(Image.fromarray(columns))
    assert torch.equal(cropped[0, 0], torch.arange(15, 45, dtype=torch.uint8))
    taller = Image.fromarray(columns.transpose(1, 0, 2))
    assert Preprocessing(size=(20, 30), resize=20, **PLAIN).pixels(taller).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), ("192x320", (192, 320)), (" 96 X 64 ", (96, 64))]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "192x", "x320", "-3", "1e2", "1x2x3", "192*320", "0x8"])
def test_other_sizes_are_rejected_by_name(text):
    with pytest.raises(PenjingError, match="height x width") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_another_size_sees_the_same_part_of_an_image():
    known = Preprocessing(size=224, resize=256, **PLAIN)
    assert adapted(known, size=112, resize=None) == Preprocessing(size=112, resize=128, **PLAIN)
    assert adapted(known, size=(448, 672)) == Preprocessing(size=(448, 672), resize=512, **PLAIN)
    assert adapted(known, size=112, resize=200).resize == 200
    assert adapted(known, size=None) is known and adapted(None, mean=None) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": 8}, "--mean, --std"),
        ({"size": 8, "mean": (0.5,), "std": (1, 1, 1)}, "1 values each"),
        ({"size": 8, **PLAIN, "resize": 4}, "resize=4"),
        ({"size": 8, **PLAIN, "interpolation": "cubic"}, "interpolation.*bicubic"),
    ],
)
def test_contradictory_options_are_one_sentence(given, words):
    with pytest.raises(PenjingError, match=words) as caught:
        adapted(None, **given)
    assert "\n" not in str(caught.value)
