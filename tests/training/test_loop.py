import copy
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import PenjingError
from penjing.net.layers import compressible
from penjing.tasks import evaluate, from_arrays
from penjing.techniques.prune_channels import PruneChannels
from penjing.techniques.prune_weights import PruneWeights
from penjing.techniques.technique import Attached, Technique
from penjing.training import TrainSettings, loop, seconds_per_epoch, train
from penjing.training.schedule import learning_rate, momentum
from penjing.training.settings import Distill


def striped(count: int):
    """Grey images 8 x 8 of stripes: horizontal, vertical or none."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, 8, 8, 1), dtype=np.uint8)
    images[labels == 0, ::2] += 120
    images[labels == 1, :, ::2] += 120
    return images, labels


@pytest.fixture(scope="module")
def task():
    return from_arrays(*striped(200), test=30, validation=60)


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(12, 3),
    )


class Nothing(Technique):
    """It leaves the model as it is."""

    name = "nothing"

    def attach(self, model, task):
        return Attached(self)


class Watch(Attached):
    """Notes progress, and does something at one of the steps."""

    def __init__(self, at: int = -1, action=None) -> None:
        super().__init__(Nothing())
        self._seen, self._at, self._action = [], at, action

    def step(self, model, progress):
        self._seen.append(progress)
        if len(self._seen) - 1 == self._at:
            self._action()


class KilledError(Exception):
    pass


def kill():
    raise KilledError


def equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_it_learns(task, optimizer, schedule):
    lr = 0.2 if optimizer == "sgd" else 0.02
    settings = TrainSettings(
        epochs=12, batch_size=32, optimizer=optimizer, schedule=schedule, lr=lr, augment=False
    )
    model = net()
    result = train(model, task, settings)
    assert result.score > 0.9 and result.score == evaluate(model, task, "validation")
    assert len(result.history) == 12 and result.epochs == 12 and not result.stopped_early
    assert result.history[-1].loss < result.history[0].loss
    assert not model.training


def test_one_cycle_is_pytorchs():
    settings = TrainSettings(lr=0.4, schedule="one_cycle", warmup=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    other = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=101, pct_start=0.3)
    for step in range(101):
        # PyTorch's peak is at step 0.3 * 101 - 1, and its last step is 100.
        place = step / 100
        peak = 0.3 * 101 - 1
        mine = step / peak * 0.3 if step <= peak else 0.3 + 0.7 * (step - peak) / (100 - peak)
        group = optimizer.param_groups[0]
        assert learning_rate(settings, mine) == pytest.approx(group["lr"], rel=1e-6), place
        assert momentum(settings, mine) == pytest.approx(group["momentum"], rel=1e-6)
        optimizer.step()
        if step < 100:
            other.step()


def test_cosine_is_pytorchs():
    settings = TrainSettings(lr=0.4, warmup=0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(settings, step / 50) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        other.step()
    assert learning_rate(TrainSettings(lr=0.4, warmup=0.2), 0.1) == pytest.approx(0.2)


def test_parts_of_an_epoch(task):
    watch = Watch()
    assert task.size("train") == 110
    result = train(net(), task, TrainSettings(epochs=2.4, batch_size=25), [watch])
    assert result.epochs == 2.4 and len(watch._seen) == 1 + 12
    assert [entry.epoch for entry in result.history] == [1.0, 2.0, 2.4]
    assert watch._seen[0] == 0.0 and watch._seen[-1] == 1.0
    assert watch._seen == sorted(watch._seen)


def settings_with_everything(**more) -> TrainSettings:
    return TrainSettings(epochs=4, batch_size=16, lr=0.05, **more)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("at", [3, 7, 17])
def test_killed_and_resumed_is_uninterrupted(task, tmp_path, monkeypatch, optimizer, ema, at):
    """Bit for bit, with dropout, augmentation, a teacher with regressors and two techniques."""
    distill = Distill(features=[("0", "0")])
    settings = settings_with_everything(optimizer=optimizer, ema=ema, distill=distill)
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)).eval()
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)

    def run(watch, checkpoint):
        model = net(dropout=0.3)
        techniques = [PruneChannels(ratio=0.3), PruneWeights(sparsity=0.5)]
        attached = [technique.attach(model, task) for technique in techniques]
        kwargs = {"teacher": teacher, "checkpoint": checkpoint}
        result = train(model, task, settings, [*attached, watch], **kwargs)
        return model, result

    whole, expected = run(Watch(), None)
    with pytest.raises(KilledError):
        run(Watch(at, kill), tmp_path / "state")
    resumed, found = run(Watch(), tmp_path / "state")
    assert equal(whole, resumed)
    assert found.history == expected.history


def test_control_c_finishes_the_step_and_leaves_a_checkpoint(task, tmp_path):
    settings = settings_with_everything()
    whole = net()
    train(whole, task, settings)
    path = tmp_path / "folder" / "state"
    interrupt = Watch(9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(net(), task, settings, [interrupt], checkpoint=path)
    assert len(interrupt._seen) == 10 and path.exists()
    resumed = net()
    train(resumed, task, settings, [Watch()], checkpoint=path)
    assert equal(whole, resumed)


def test_finished_checkpoint_gives_the_result_at_once(task, tmp_path):
    settings, path = settings_with_everything(ema=0.9), tmp_path / "state"
    first, again, watch = net(), net(), Watch()
    expected = train(first, task, settings, [Watch()], checkpoint=path)
    found = train(again, task, settings, [watch], checkpoint=path)
    assert equal(first, again) and found.history == expected.history
    assert watch._seen == [0.0]


def test_checkpoint_of_another_training(task, tmp_path):
    path = tmp_path / "state"
    train(net(), task, settings_with_everything(), checkpoint=path)
    with pytest.raises(PenjingError, match="other settings"):
        train(net(), task, settings_with_everything(seed=1), checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(PenjingError, match="not a checkpoint"):
        train(net(), task, settings_with_everything(), checkpoint=path)


def test_time_budget_ends_training_with_complete_schedules(task, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    model, watch = net(), Watch()
    pruning = PruneWeights(sparsity=0.5).attach(model, task)
    settings = TrainSettings(epochs=100, batch_size=16, time_budget=60)
    result = train(model, task, settings, [pruning, watch])
    assert result.stopped_early and result.epochs < 20
    assert watch._seen[-1] == 1.0 and watch._seen == sorted(watch._seen)
    pruning.bake(model)
    zeros = sum(int((m.weight == 0).sum()) for m in compressible(model).values())
    assert zeros == round(0.5 * sum(m.weight.numel() for m in compressible(model).values()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_zeros_of_sparse_layers_stay(task, optimizer, ema):
    model = net()
    for layer in (model[0], model[3]):
        layer.weight.data *= torch.rand_like(layer.weight) > 0.5
        layer.sparse = True
    before = copy.deepcopy(model)
    settings = TrainSettings(epochs=2, optimizer=optimizer, weight_decay=0.1, lr=0.1, ema=ema)
    train(model, task, settings)
    for new, old in ((model[0], before[0]), (model[3], before[3])):
        assert torch.equal(new.weight == 0, old.weight == 0)
        assert not torch.equal(new.weight, old.weight)
    assert not model[0].weight._backward_hooks


def test_decay_leaves_norms_and_biases_alone(task):
    model = net()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    optimizer = loop._optimizer(model, None, TrainSettings(weight_decay=0.5, lr=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for name, value in model.named_parameters() if (value != 1).any()}
    assert decayed == {"0.weight", "3.weight", "8.weight"}


def test_average_is_of_all_steps(task):
    """The result is the recursion over the weights after each step, computed here anew."""
    settings = TrainSettings(epochs=2, batch_size=32, ema=0.9, lr=0.1)
    model, seen = net(), []

    class Collect(Watch):
        def step(self, model, progress):
            seen.append(model[8].weight.detach().clone())

    train(model, task, settings, [Collect()])
    average = seen[0]
    count = len(seen) - 2  # One before the first step, one after the average was put in place.
    for step in range(1, count + 1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * seen[step]
    torch.testing.assert_close(model[8].weight.detach(), average, rtol=1e-5, atol=1e-6)


def test_divergence(task):
    model = net()
    with pytest.raises(PenjingError, match=r"at step \d+; lower lr"):
        train(model, task, TrainSettings(epochs=5, lr=1e20, warmup=0.0))


def test_teacher_and_setting_belong_together(task):
    with pytest.raises(PenjingError, match="only the teacher"):
        train(net(), task, TrainSettings(), teacher=net())
    with pytest.raises(PenjingError, match="only the setting"):
        train(net(), task, TrainSettings(distill=Distill()))


def test_randomness_outside_is_left_alone(task):
    torch.manual_seed(5)
    expected = torch.rand(1)
    model = net(dropout=0.5)
    torch.manual_seed(5)
    train(model, task, TrainSettings(epochs=0.2))
    assert torch.equal(torch.rand(1), expected)


def test_last_batch_of_one_image_is_left_out():
    task = from_arrays(*striped(100), test=1, validation=10)
    assert task.size("train") == 89
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    result = train(model, task, TrainSettings(epochs=1, batch_size=44, augment=False))
    assert result.epochs == 1 and math.isfinite(result.history[0].loss)


@pytest.mark.parametrize(("images", "batch_size"), [(4, 1), (4, 3), (4, 128), (19, 16), (19, 18)])
@pytest.mark.parametrize("epochs", [0.01, 1.5])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_few_images(images, batch_size, epochs, ema):
    """Batches larger than the data, a last batch of one image, one image of a class."""
    task = from_arrays(*striped(images), validation=striped(1), test=striped(1))
    model = net()
    result = train(model, task, TrainSettings(epochs=epochs, batch_size=batch_size, ema=ema))
    assert all(math.isfinite(epoch.loss) for epoch in result.history)
    assert result.score in (0.0, 1.0)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert int(model[1].num_batches_tracked) == max(
        1, round(epochs * result_steps(images, batch_size))
    )


def result_steps(images: int, batch_size: int) -> int:
    """In an epoch: a last batch of one image is left out."""
    return max(1, images // batch_size + (images % batch_size > 1))


def test_a_batch_of_one_image_is_too_small_for_some_norms():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    task = from_arrays(*striped(9), validation=striped(3), test=striped(3))
    with pytest.raises(PenjingError, match=r"give batch_size \(it is 1\) and training images"):
        train(model, task, TrainSettings(batch_size=1))
    train(model, task, TrainSettings(batch_size=2))


def test_seconds_per_epoch(task):
    model = net()
    before = copy.deepcopy(model)
    assert seconds_per_epoch(model, task) > 0
    assert seconds_per_epoch(model, task, teacher=model) > 0
    assert equal(before, model) and model.training == before.training


def test_progress_bar_is_on_standard_error(task, capsys):
    train(net(), task, TrainSettings(epochs=1), progress=True)
    captured = capsys.readouterr()
    assert not captured.out and "loss" in captured.err and "validation" in captured.err
