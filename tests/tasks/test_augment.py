import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from penjing.tasks.augment import flip, shift


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), side=st.sampled_from([16, 28, 32]))
def test_shift_is_a_crop_of_the_padded_image(seed, side):
    pixels = torch.randint(1, 256, (3, 2, side, side), dtype=torch.uint8)
    moved = shift(pixels, torch.Generator().manual_seed(seed))
    reach = side // 8
    for before, after in zip(F.pad(pixels, (reach,) * 4), moved, strict=True):
        crops = before.unfold(1, side, 1).unfold(2, side, 1)
        same = (crops == after[:, None, None]).all(dim=(0, 3, 4))
        assert same.any()


def test_shift_reaches_every_position_and_flip_half_of_the_images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(2000, 1, 16, 16, dtype=torch.uint8)
    pixels[:, :, 8, 4] = 1
    positions = shift(pixels, generator).flatten(1).argmax(1)
    assert len(positions.unique()) == 25
    near = shift(pixels, generator, 0.1).flatten(1).argmax(1)
    assert len(near.unique()) == 9
    flipped = flip(pixels, generator)[:, 0, 8, 11].float().mean()
    assert abs(float(flipped) - 0.5) < 0.05


def test_each_axis_of_an_oblong_image_is_shifted_by_its_own_share():
    pixels = torch.ones(500, 1, 8, 64, dtype=torch.uint8)
    moved = shift(pixels, torch.Generator().manual_seed(0))
    assert moved.sum((2, 3)).min() == 7 * 56
