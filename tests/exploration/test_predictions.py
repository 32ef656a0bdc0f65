"""The classes that a point gives, beside the original's, on images whose answer is known."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from penjing.exploration.predictions import predictions
from penjing.tasks import Task, from_arrays


def task(classes: int, images: int) -> Task:
    """``images`` pictures whose grey is their number, of classes in turn; all are validation images."""
    pixels = np.broadcast_to(np.arange(images)[:, None, None], (images, 8, 8)).astype(np.uint8)
    part = pixels, np.arange(images) % classes
    return from_arrays(*part, validation=part, test=part)


def outputs(given: list[int], classes: int) -> torch.Tensor:
    return torch.eye(classes)[torch.tensor(given)]


def test_confusion_and_pictures():
    """Image 1 of six gets lost, image 5 is found, image 3 goes from one wrong class to another."""
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    before, after = outputs([0, 1, 2, 1, 1, 0], 3), outputs([0, 2, 2, 2, 1, 2], 3)
    found = predictions(task(3, 6), before, after, targets)
    assert (found["changed"], found["images"], found["classes"]) == (3, 6, ["0", "1", "2"])
    assert found["before"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert found["after"] == [[1, 0, 1], [0, 1, 1], [0, 0, 2]]
    named = [(one["true"], one["before"], one["after"]) for one in found["pictures"]]
    assert named == [("1", "1", "2"), ("0", "1", "2"), ("2", "0", "2")], "the lost one first"
    shown = Image.open(io.BytesIO(base64.b64decode(found["pictures"][0]["png"])))
    assert np.asarray(shown).shape == (8, 8) and (np.asarray(shown) == 1).all()


def test_of_many_classes_those_with_changes_are_told():
    """Forty classes, two images each; only images of the last two classes change."""
    targets = torch.arange(80) % 40
    given = targets.clone()
    given[38], given[39] = 39, 38
    found = predictions(
        task(40, 80), outputs(targets.tolist(), 40), outputs(given.tolist(), 40), targets
    )
    assert len(found["classes"]) == 20 and {"38", "39"} <= set(found["classes"])
    assert found["after"][-2:] == [[0] * 18 + [1, 1], [0] * 18 + [1, 1]]
    assert len(found["pictures"]) == 2


def test_nothing_changes():
    targets = torch.tensor([0, 1])
    same = torch.tensor([-1.0, 2.0])[:, None]  # one logit for two classes
    found = predictions(task(2, 2), same, same, targets)
    assert (found["changed"], found["pictures"]) == (0, [])
    assert found["before"] == found["after"] == [[1, 0], [0, 1]]
