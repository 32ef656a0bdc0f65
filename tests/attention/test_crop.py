"""Crops: regions inside the frame, inputs as the model wants them, margins that are learned."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from penjing import PenjingError
from penjing.attention import Crop
from penjing.attention.crop import learn

SIDES = st.integers(20, 400)
SHARES = st.tuples(*[st.floats(0, 1)] * 4)


@given(SIDES, SIDES, SHARES, st.floats(0, 0.5), st.integers(1, 30), st.sampled_from([1, 2, 8]))
def test_a_region_holds_its_box_and_lies_in_the_frame(
    height: int, width: int, shares: tuple, margin: float, least: int, align: int
):
    left, right = sorted((shares[0] * width, shares[2] * width))
    top, bottom = sorted((shares[1] * height, shares[3] * height))
    assume(right - left > 1 and bottom - top > 1)
    crop = Crop(
        left=margin, top=margin, right=margin, bottom=margin, min_size=least, align=align, height=8
    )
    x1, y1, x2, y2 = crop.region((left, top, right, bottom), height, width)
    assert 0 <= x1 <= left and right <= x2 <= width and 0 <= y1 <= top and bottom <= y2 <= height
    assert x2 - x1 >= min(least, width) and y2 - y1 >= min(least, height)
    assert x1 % align == 0 and y1 % align == 0


def test_the_shorter_side_grows_to_the_aspect():
    crop = Crop(aspect=2.0, height=8)
    assert crop.region((100, 100, 140, 140), 300, 300) == (80, 100, 160, 140)
    assert crop.region((100, 100, 180, 120), 300, 300) == (100, 90, 180, 130)


def test_at_the_border_a_region_moves_inwards():
    assert Crop(min_size=40, height=8).region((0, 290, 10, 300), 300, 300) == (0, 260, 40, 300)


def test_margins_are_shares_of_the_box():
    crop = Crop(left=0.1, right=0.2, top=-0.25, bottom=0.5, height=8)
    assert crop.region((100, 100, 200, 140), 400, 400) == (90, 110, 220, 160)


def test_the_input_is_scaled_as_the_model_wants():
    frame = np.zeros((50, 100, 3), np.uint8)
    frame[..., 0] = 255
    half = Crop(height=10, width=20, mean=(0.5,) * 3, std=(0.5,) * 3)
    cut = half.cut(frame, (0, 0, 100, 50))
    assert cut.shape == (1, 3, 10, 20) and cut.dtype == np.float32
    assert np.allclose(cut[0, :, 0, 0], [1, -1, -1])
    turned = half.model_copy(update={"bgr": True}).cut(frame, (0, 0, 100, 50))
    assert np.allclose(turned[0, :, 0, 0], [-1, -1, 1])
    grey = Crop(height=10, width=20, channels=1)
    assert np.allclose(grey.cut(frame, (0, 0, 100, 50)), 76 / 255, atol=0.01)


def test_the_natural_width_follows_the_region():
    crop = Crop(height=10, multiple=4, min_width=12, max_width=40, stretch=1.5)
    frame = np.zeros((100, 400, 3), np.uint8)
    widths = [crop.cut(frame, (0, 0, w, 20)).shape[3] for w in (10, 20, 40, 400)]
    assert widths == [12, 16, 32, 40]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 8, "channels": 2}, "expected 1"),
        ({"height": 8, "mean": (0.5, 0.5)}, "1 or 3 values each"),
        ({"height": 8, "min_width": 9, "max_width": 8}, "over max_width"),
        ({}, "height"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        Crop(**settings)


def test_learning_finds_the_margins_that_show_the_object():
    """The model behind wants a quarter more on the right and below: the score says how near it is."""
    frame = np.zeros((200, 300, 3), np.uint8)
    frame[50:90, 100:180] = 255  # the object; its box says 64 x 32
    box = (100, 50, 164, 82)
    start = Crop(height=40, width=80)
    object_alone = np.ones((1, 3, 40, 80), np.float32)

    def score(inputs: list[np.ndarray]) -> float:
        """1 for a crop that is bright all over and as large as it can be."""
        (crop,) = inputs
        return float(-np.abs(crop - object_alone).mean()) + 0.2 * sizes[-1]

    sizes: list[float] = []

    class Sized(Crop):
        def cut(self, frame: np.ndarray, box: tuple) -> np.ndarray:
            left, top, right, bottom = self.region(box, *frame.shape[:2])
            sizes.append((right - left) * (bottom - top) / 3200)
            return super().cut(frame, box)

    learned = learn(Sized(**start.model_dump()), [(frame, box)], score, trials=120, jitter=0.0)
    assert learned.right == pytest.approx(0.25, abs=0.06)
    assert learned.bottom == pytest.approx(0.25, abs=0.06)
    assert abs(learned.left) < 0.06 and abs(learned.top) < 0.06


def test_learning_is_repeatable_and_begins_with_what_is_given():
    frame = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    tried: list[np.ndarray] = []

    def score(inputs: list[np.ndarray]) -> float:
        tried.append(inputs[0])
        return float(inputs[0].std())

    start = Crop(height=8, width=8, left=0.07, top=-0.1)
    samples = [(frame, (20, 20, 60, 40))]
    one = learn(start, samples, score, trials=8, jitter=0.0)
    assert np.array_equal(tried[0], start.cut(*samples[0]))
    assert one == learn(start, samples, score, trials=8, jitter=0.0)
    assert one.model_dump(exclude={"left", "top", "right", "bottom"}) == start.model_dump(
        exclude={"left", "top", "right", "bottom"}
    )


def test_there_must_be_samples():
    with pytest.raises(PenjingError, match="no samples"):
        learn(Crop(height=8), [], lambda _: 0.0)
