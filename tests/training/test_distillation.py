import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing.errors import PenjingError
from penjing.tasks import from_arrays
from penjing.training import Distill, TrainSettings, distill
from penjing.training.distillation import DistillationLoss, feature_loss, soft_loss


@pytest.fixture(scope="module")
def task():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    return from_arrays(images, np.arange(64) % 3, test=8, validation=8)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(F.relu(self.coarse(F.relu(self.fine(x)))).mean((2, 3)))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_loss_is_the_divergence(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    mine, theirs = ((x / temperature).softmax(1).numpy() for x in (student, teacher))
    expected = (theirs * np.log(theirs / mine)).sum(1).mean() * temperature**2
    assert float(soft_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-9)


def test_soft_loss_of_two_classes_in_closed_form():
    """Teacher (1/2, 1/2), student (p, 1 - p): ln 2 + ... = -(ln 4p(1 - p)) / 2."""
    p = 0.9
    student = torch.tensor([[math.log(p), math.log(1 - p)]])
    expected = -math.log(4 * p * (1 - p)) / 2
    assert float(soft_loss(student, torch.zeros(1, 2), 1.0)) == pytest.approx(expected, rel=1e-5)


def test_gradient_at_high_temperature_is_that_of_matched_logits():
    """Hinton et al. 2015, equation 4: (z - v) / C for zero-mean logits of C classes."""
    torch.manual_seed(0)
    z, v = (x - x.mean() for x in torch.randn(2, 1, 6).double())
    z.requires_grad_(True)
    soft_loss(z, v, 1e4).backward()
    torch.testing.assert_close(z.grad, (z - v).detach() / 6, rtol=1e-3, atol=1e-6)


def test_feature_loss_is_one_for_a_silent_student():
    teacher = torch.randn(2, 3, 4, 4)
    assert float(feature_loss(torch.zeros_like(teacher), teacher)) == pytest.approx(1.0)
    assert float(feature_loss(teacher, teacher)) == 0.0


def test_whole_loss(task):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    settings = Distill(temperature=3.0, weight=0.7, features="auto", feature_weight=0.5)
    loss = DistillationLoss(student, teacher, task, settings)
    assert loss.pairs == [("fine", "fine"), ("coarse", "coarse")]
    batch = torch.randn(5, 1, 8, 8)
    output, hard = student(batch), torch.tensor(2.0)
    found = loss(batch, output, hard)
    with torch.no_grad():
        fine = [net.fine(batch) for net in (student, teacher)]
        coarse = [net.coarse(F.relu(x)) for net, x in zip((student, teacher), fine, strict=True)]
        parts = [
            F.mse_loss(regressor(mine), theirs) / (theirs**2).mean()
            for regressor, (mine, theirs) in zip(loss.regressors, (fine, coarse), strict=True)
        ]
        expected = 0.3 * 2.0 + 0.7 * soft_loss(output, teacher(batch), 3.0)
        expected += 0.5 * (parts[0] + parts[1]) / 2
    torch.testing.assert_close(found.detach(), expected)
    loss.close()
    assert not student.fine._forward_hooks and not teacher.coarse._forward_hooks


class Heads(nn.Module):
    """Class maps, and two values an image; an auxiliary head while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.values = nn.Conv2d(1, 3, 1), nn.Linear(64, 2)

    def forward(self, x):
        heads = {"maps": self.maps(x), "values": self.values(x.flatten(1))}
        return heads | {"aux": 2 * heads["maps"]} if self.training else heads


def test_several_outputs_are_added_up():
    torch.manual_seed(0)
    x, y = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), np.uint8), np.arange(60) % 3
    task = from_arrays(x, y, loss=lambda o, y: o["maps"].mean(), score=lambda o, y: 0.0)
    student, teacher = Heads().train(), Heads().eval()
    loss = DistillationLoss(student, teacher, task, Distill(temperature=2.0, weight=1.0))
    batch = torch.randn(5, 1, 8, 8)
    found, expected = student(batch), teacher(batch)
    all_images = torch.cat([images for images, _ in task.batches("train")])
    spread = teacher(all_images)["values"].var(correction=0)
    pixels = [out["maps"].movedim(1, -1).reshape(-1, 3) for out in (found, expected)]
    wanted = soft_loss(*pixels, 2.0)
    wanted = wanted + F.mse_loss(found["values"], expected["values"]) / spread
    torch.testing.assert_close(loss(batch, found, torch.tensor(7.0)), wanted)
    with pytest.raises(PenjingError, match="for the same classes"):
        DistillationLoss(nn.Conv2d(1, 3, 1), teacher, task, Distill())


def test_auto_pairs_by_resolution_when_no_names_agree(task):
    teacher = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 3)
    )
    loss = DistillationLoss(Net(4), teacher, task, Distill(features="auto"))
    assert loss.pairs == [("fine", "1"), ("coarse", "2")]


@pytest.mark.parametrize(
    ("features", "message"),
    [([("nothing", "fine")], "student has no layer"), ([("fine", "coarse")], "positions")],
)
def test_wrong_features(task, features, message):
    with pytest.raises(PenjingError, match=message):
        DistillationLoss(Net(4), Net(6), task, Distill(features=features))


def test_teacher_of_other_classes(task):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(PenjingError, match="classes"):
        distill(Net(4), task, teacher)


@pytest.mark.parametrize("features", [None, "auto"])
def test_student_comes_to_answer_as_the_teacher(task, features):
    torch.manual_seed(0)
    student, teacher = Net(8), Net(12).eval()
    before = [value.clone() for value in student.state_dict().values()]
    training = TrainSettings(epochs=15, batch_size=16, optimizer="adamw", lr=0.01, augment=False)
    trained = distill(student, task, teacher, training=training, weight=1.0, features=features)
    batch = torch.cat([images for images, _ in task.batches("train")])
    with torch.no_grad():
        old, new = (soft_loss(net(batch), teacher(batch), 4.0) for net in (student, trained))
    assert new < 0.2 * old
    after = student.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(trained.state_dict()) == set(student.state_dict())
