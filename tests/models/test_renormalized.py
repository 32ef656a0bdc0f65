"""A teacher sees what its own preprocessing makes of the student's images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from penjing import models, tasks
from penjing.recipe import identity
from penjing.tasks import Preprocessing
from penjing.training import TrainSettings, distill

STUDENT = Preprocessing(size=24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
OTHER = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.1)}


class Seen(nn.Module):
    """Returns what it is given."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def picture(size: int = 24) -> Image.Image:
    """Smooth, as photographs mostly are."""
    rows, columns = np.mgrid[:size, :size] / size
    colours = [np.sin(3 * rows + k) * np.cos(4 * columns - k) for k in range(3)]
    return Image.fromarray((127 * (1 + np.stack(colours, -1))).astype(np.uint8))


def seen(wanted: Preprocessing, given: Preprocessing = STUDENT) -> torch.Tensor:
    """What a teacher for ``wanted`` sees of the picture that a student for ``given`` sees."""
    batch = given.normalize(given.pixels(picture())[None])
    return models.renormalized(Seen(), given, wanted)(batch)


def direct(wanted: Preprocessing) -> torch.Tensor:
    return wanted.normalize(wanted.pixels(picture())[None])


def test_normalization_is_the_teachers():
    wanted = Preprocessing(size=24, **OTHER)
    torch.testing.assert_close(seen(wanted), direct(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [12, 17, 48, (16, 40)])
def test_size_is_the_teachers(size):
    """As Pillow resizes the pixels, which rounds twice, after rows and columns: by 1/255 at most."""
    wanted = Preprocessing(size=size, **OTHER)
    pixels = torch.tensor(OTHER["std"]).view(-1, 1, 1) * (seen(wanted) - direct(wanted))
    assert seen(wanted).shape[2:] == (wanted.height, wanted.width)
    assert pixels.abs().max() <= 1 / 255 + 1e-6


def test_channels_are_the_teachers():
    grey = Preprocessing(size=24, channels=1, mean=(0.3,), std=(0.2,))
    steps = 0.2 * (seen(grey) - direct(grey))
    assert steps.abs().max() <= 1 / 255
    colour = Preprocessing(size=24, **OTHER)
    expected = colour.normalize(grey.pixels(picture())[None].expand(-1, 3, -1, -1))
    torch.testing.assert_close(seen(colour, grey), expected, atol=1e-5, rtol=1e-5)


def test_a_teacher_of_the_same_preprocessing_is_itself():
    teacher = Seen()
    another_crop = STUDENT.model_copy(update={"resize": 30})
    assert models.renormalized(teacher, STUDENT, another_crop) is teacher


def test_layers_keep_their_names_and_modes():
    inner = models.load("penjing:resnet8").train()
    teacher = models.renormalized(inner, STUDENT, Preprocessing(size=32, **OTHER))
    assert [name for name, _ in teacher.named_modules()] == [n for n, _ in inner.named_modules()]
    assert teacher.get_submodule("3.conv1") is inner[3].conv1
    assert not teacher.eval().training and not inner[1].training
    assert teacher.double().state_dict()["wanted_mean"].dtype == torch.float64


def task() -> tasks.Task:
    dice = np.random.default_rng(0)
    images = dice.integers(0, 256, (24, 24, 24, 3)).astype(np.uint8)
    return tasks.from_arrays(images, dice.integers(0, 2, 24), preprocessing=STUDENT)


def test_distillation_learns_from_what_the_teacher_sees():
    """Features by name, and the gradient that the pixels themselves would give."""
    torch.manual_seed(0)
    teacher = models.load("penjing:resnet8", num_classes=2)
    wanted = Preprocessing(size=24, **OTHER)
    scale = torch.tensor(STUDENT.std) / torch.tensor(OTHER["std"])
    shift = (torch.tensor(STUDENT.mean) - torch.tensor(OTHER["mean"])) / torch.tensor(OTHER["std"])

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = teacher

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(image * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))

    student = models.load("penjing:resnet8", num_classes=2)
    settings = TrainSettings(epochs=1, batch_size=12, ema=None)
    made = []
    for guide, name in (
        (models.renormalized(teacher, STUDENT, wanted), "4"),
        (ByHand(), "inner.4"),
    ):
        pairs = {"features": [("4", name)]}
        made.append(distill(student, task(), guide, training=settings, **pairs))
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_what_the_teacher_sees_counts_where_results_are_kept():
    teacher = models.load("penjing:resnet8", num_classes=2)
    kinds = [Preprocessing(size=size, **OTHER) for size in (24, 32)]
    guides = [teacher, *(models.renormalized(teacher, STUDENT, kind) for kind in kinds)]
    assert len({identity(task(), guide).hexdigest() for guide in guides}) == 3
