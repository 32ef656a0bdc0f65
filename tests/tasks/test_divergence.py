import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from penjing import tasks
from penjing.errors import PenjingError
from penjing.tasks import divergence


def task_of(classes: int, loss=None) -> tasks.Task:
    images = np.zeros((24, 4, 4, 3), np.uint8)
    return tasks.from_arrays(images, np.arange(24) % classes, loss=loss, score=loss)


def some_loss(output, target):
    return torch.zeros(())


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5, 3)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_scores_are_compared_by_the_divergence_of_their_softmax(shape, temperature):
    torch.manual_seed(0)
    found, expected = torch.randn(2, *shape, dtype=torch.float64)
    a, b = (x / temperature for x in (found, expected))
    rows = F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(
        divergence.of_scores(found, expected, temperature), rows.reshape(6, -1).mean(1)
    )


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 1, 3, 2)])
def test_one_logit_is_a_bernoulli_variable(shape):
    torch.manual_seed(0)
    found, expected = torch.randn(2, *shape, dtype=torch.float64)
    p, q = expected.sigmoid(), found.sigmoid()
    closed = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(divergence.of_scores(found, expected), closed.reshape(8, -1).mean(1))


def test_values_are_compared_in_units_of_their_variance():
    expected = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # variance 5
    spread = divergence.spread_of(expected)
    assert float(spread) == 5
    found = expected + torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(
        divergence.of_values(found, expected, spread), torch.tensor([0.5, 0])
    )
    mean = expected.mean().expand(2, 2)
    assert float(divergence.of_values(mean, expected, spread).mean()) == pytest.approx(1)
    assert float(divergence.spread_of(torch.full((1, 1), 3.0))) == 9
    assert float(divergence.spread_of(torch.zeros(1, 1))) > 0


def test_a_classifier_is_compared_by_its_logits_alone():
    task, (a, b) = task_of(3), torch.randn(2, 5, 3)
    found = task.divergence({"logits": a, "other": b}, (b, a.mean()))
    torch.testing.assert_close(found, divergence.of_scores(a, b))
    assert found.shape == (5,) and not task.divergence(a, a).any()


def test_every_output_of_another_task_counts():
    task = task_of(3, some_loss)
    maps, boxes = torch.randn(2, 5, 3, 2, 2), torch.randn(2, 5, 4)
    found = task.divergence(
        {"maps": maps[0], "boxes": boxes[0], "top": maps[0].argmax(1)},
        {"maps": maps[1], "boxes": boxes[1], "top": maps[1].argmax(1)},
    )
    values = (boxes[0] - boxes[1]).square().mean(1) / boxes[1].var(correction=0)
    torch.testing.assert_close(found, divergence.of_scores(*maps) + values)


@pytest.mark.parametrize(
    ("classes", "shape", "scores"),
    [
        (3, (5, 3), True),
        (3, (5, 3, 2, 2), True),
        (3, (5, 4), False),
        (3, (5, 1), False),
        (3, (5,), False),
        (2, (5,), True),
        (2, (5, 1), True),
    ],
)
def test_scores_are_told_from_values_by_the_number_of_classes(classes, shape, scores):
    assert task_of(classes, some_loss).compared(torch.zeros(shape))[0].scores is scores


def test_numbers_of_several_labels_an_image_are_no_scores():
    task = task_of(3, some_loss)
    task.__dict__["_target"] = torch.zeros(1, 3, dtype=torch.long)
    assert not task.compared(torch.zeros(5, 3))[0].scores
    task.__dict__["_target"] = torch.zeros(1)
    assert not task.compared(torch.zeros(5, 3))[0].scores


def test_an_output_without_floats_cannot_be_compared():
    with pytest.raises(PenjingError, match="without floats"):
        task_of(3, some_loss).compared(torch.zeros(5, 3, dtype=torch.long))


def test_one_logit_of_two_classes_is_judged_as_two_logits():
    task, logit = task_of(2), torch.tensor([2.0, -1.0, 0.5])
    target = torch.tensor([1, 0, 0])
    both = torch.stack([torch.zeros(3), logit], 1)
    for output in (logit, logit[:, None], {"logit": logit}, both):
        expected = F.binary_cross_entropy_with_logits(logit, target.float())
        torch.testing.assert_close(task.loss(output, target), expected)
        assert task.score(output, target) == pytest.approx(2 / 3)
    smooth = F.binary_cross_entropy_with_logits(logit, target * 0.8 + 0.1)
    torch.testing.assert_close(task.loss(logit, target, label_smoothing=0.2), smooth)
    assert math.isclose(float(task.divergence(logit, both).abs().max()), 0, abs_tol=1e-7)


def test_rounding_makes_nothing_negative():
    expected = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    output = expected + 1e-7 * torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    assert divergence.of_scores(output, expected).min() < 0
    assert task_of(3).divergence(output, expected).min() == 0
