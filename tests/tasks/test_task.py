import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from penjing import tasks
from penjing.errors import PenjingError

Named = namedtuple("Named", "z aux")


def make_task(count: int = 100, **options) -> tasks.Task:
    """Image ``i`` is filled with the value ``i`` and labelled ``i % 4``."""
    images = (
        np.zeros((count, 8, 8, 3), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    return tasks.from_arrays(images, np.arange(count) % 4, **options)


def values(batches) -> list[int]:
    """Which images the batches hold."""
    return [round((float(image[0, 4, 4]) + 1) * 127.5) for batch, _ in batches for image in batch]


def test_a_pass_reads_every_image_once_with_its_label():
    task = make_task()
    for shuffle in (False, True):
        found = values(task.batches("train", 7, shuffle=shuffle))
        assert len(found) == len(set(found)) == task.size("train") == 81
        labels = [int(label) for _, y in task.batches("train", 7, shuffle=shuffle) for label in y]
        assert labels == [value % 4 for value in found]
        assert (found == sorted(found)) is not shuffle


def test_order_depends_on_the_seed_only():
    task = make_task()
    first = values(task.batches("train", shuffle=True, seed=1))
    assert first == values(task.batches("train", shuffle=True, seed=1))
    assert first != values(task.batches("train", shuffle=True, seed=2))


def test_limit_is_a_fixed_random_choice():
    task = make_task()
    chosen = values(task.batches("train", limit=20))
    assert chosen == values(task.batches("train", limit=20)) == sorted(chosen)
    assert len(chosen) == 20 and max(chosen) > 50
    assert values(task.batches("train", limit=1000)) == values(task.batches("train"))


def test_calibration_is_unshuffled_unaugmented_training_data():
    task = make_task()
    batches = task.calibration(images=30, batch_size=8)
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]
    found = values((batch, None) for batch in batches)
    assert set(found) <= set(values(task.batches("train")))
    assert torch.equal(torch.cat(batches), torch.cat(task.calibration(30, 8)))


def test_augmentation_changes_the_pixels_and_not_the_labels():
    task = make_task()
    (plain, labels), (changed, same) = (
        next(task.batches("train", 81, augment=augment)) for augment in (False, True)
    )
    assert torch.equal(labels, same) and not torch.equal(plain, changed)
    assert plain.shape == changed.shape


def test_a_number_says_how_far_images_are_shifted():
    task = tasks.from_arrays(np.full((90, 16, 16), 255, np.uint8), np.arange(90) % 3)

    def moved_in(augment: bool | float) -> int:
        """The most rows and columns of one image that are black."""
        images, _ = next(task.batches("train", 72, augment=augment))
        black = (images == images.min()) & (images.min() < images.max())
        rows, columns = black.all(3).sum(2).amax(), black.all(2).sum(2).amax()
        return max(int(rows), int(columns))

    assert [moved_in(share) for share in (False, 0.1, True, 0.25)] == [0, 1, 2, 4]


def test_example_is_one_input():
    example = make_task().example
    assert example.shape == (1, 3, 8, 8) and example.dtype == torch.float32


def test_fingerprint_follows_data_and_preprocessing():
    task = make_task()
    assert task.fingerprint == make_task().fingerprint
    coarser = tasks.Preprocessing(size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    others = [make_task(99), make_task(seed=1), make_task(preprocessing=coarser)]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 4


class Constant(nn.Module):
    """Always answers class ``answer`` of ``classes``, with dropout that must be off."""

    def __init__(self, answer: int, classes: int = 4):
        super().__init__()
        self.logits = nn.Parameter(torch.eye(classes)[answer] + 1)
        self.dropout = nn.Dropout(1.0)
        self.dropout.train()

    def forward(self, x):
        return self.dropout(self.logits.expand(len(x), -1))


def test_evaluate_is_top1_and_leaves_the_modes_alone():
    task = make_task()
    model = Constant(1).eval()
    model.dropout.train()
    labels = torch.cat([y for _, y in task.batches("train")])
    assert tasks.evaluate(model, task, "train", batch_size=9) == float(
        (labels == 1).double().mean()
    )
    assert not model.training and model.dropout.training


def test_loss_is_cross_entropy():
    task = make_task()
    output, target = torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)
    assert float(task.loss(output, target)) == pytest.approx(math.log(4))
    assert float(task.loss(output, target, label_smoothing=0.1)) == pytest.approx(math.log(4))


def test_own_loss_and_score():
    task = make_task(
        loss=lambda output, target: output.sum(),
        score=lambda output, target: -float((output - target[:, None]).abs().mean()),
    )
    assert float(task.loss(torch.ones(2, 3), torch.zeros(2))) == 6
    assert task.score(torch.ones(2, 1), torch.zeros(2)) == -1
    with pytest.raises(PenjingError, match="custom loss"):
        task.loss(torch.ones(2, 3), torch.zeros(2), label_smoothing=0.1)
    task.check(Constant(0, classes=7))


def test_check_accepts_a_model_that_fits():
    make_task().check(Constant(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Constant(1, classes=10), r"shape \[1, 10\], expected \[1, 4\]"),
        (nn.Linear(3, 4), "does not take the task's input"),
        (nn.Conv2d(1, 4, 3), "does not take the task's input"),
        (nn.Identity(), r"expected \[1, 4\]"),
        (nn.Conv2d(3, 4, 3).double(), r"its parameters are float64, expected float32"),
    ],
)
def test_check_refuses_a_model_that_does_not(model, message):
    with pytest.raises(PenjingError, match=message):
        make_task().check(model)


class Formed(nn.Module):
    """Returns four class scores in one of the forms in which models return them."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.linear = form, nn.Linear(3, 4)

    def forward(self, x):
        y = self.linear(x.mean((2, 3)))
        return {
            "tensor": y,
            "dict": {"z": y, "a": x.mean()},
            "tuple": (y, x.mean((2, 3))),
            "list": [y],
            "named": Named(y, None),
            "auxiliary head": (y, 2 * y) if self.training else y,
        }[self.form]


@pytest.mark.parametrize("form", ["tensor", "dict", "tuple", "list", "named", "auxiliary head"])
def test_a_model_is_scored_in_whatever_form_it_returns_its_logits(form):
    torch.manual_seed(0)
    task, model = make_task(), Formed(form).eval()
    task.check(model)
    x, y = next(task.batches("train", 81))
    best = model.linear(x.mean((2, 3))).argmax(1)
    assert tasks.evaluate(model, task, "train", batch_size=9) == float((best == y).double().mean())
    found, _ = tasks.outputs_of(model, task.batches("train", 9))
    assert type(found) is type(model(x))


def test_own_loss_and_score_get_what_the_model_returns():
    seen = []

    def loss(output, target):
        seen.append(("loss", type(output), list(output)))
        return output["z"].sum()

    def score(output, target):
        seen.append(("score", type(output), list(output)))
        return float(output["a"].sum())

    make_task(loss=loss, score=score).check(Formed("dict"))
    assert seen == [("score", dict, ["z", "a"]), ("loss", dict, ["z", "a"])]


def one_value_a_channel() -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(0), nn.Unflatten(0, (1, 6)), nn.BatchNorm1d(6),
        nn.Flatten(0), nn.Unflatten(0, (2, 3)), nn.Linear(3, 4),
    )  # fmt: skip


def test_check_runs_the_model_in_training_mode():
    model = one_value_a_channel().eval()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(PenjingError, match=r"does not run in training mode .*more than 1 value"):
        make_task().check(model)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    make_task().check(norm)
    assert not norm[0].running_mean.any() and norm.training


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        (
            {"loss": lambda o, y: o[:, 0].sum()},
            r"loss does not take .* a tuple of \[2, 4\], \[2, 4\]",
        ),
        ({"loss": lambda o, y: o[0].sum(1)}, r"loss gives a tensor \[2\], expected one number"),
        ({"loss": lambda o, y: 3.0}, "loss gives 3.0, expected"),
        ({"score": lambda o, y: o.logits}, r"score does not take what the model returns, \[2, 4\]"),
    ],
)
def test_check_names_the_loss_or_score_that_does_not_fit(judged, message):
    with pytest.raises(PenjingError, match=message):
        make_task(**judged).check(Formed("auxiliary head"))


def test_check_leaves_random_numbers_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout())
    state = torch.get_rng_state()
    make_task().check(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_split_is_named():
    task = make_task()
    del task.splits["test"]
    assert not task.has_test
    with pytest.raises(PenjingError, match="no test images"):
        tasks.evaluate(Constant(0), task, "test")
