"""The training loop, for models with or without techniques attached."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing import files
from penjing.errors import PenjingError
from penjing.net import layers
from penjing.progress import Bar, bar, say
from penjing.tasks import Task, evaluate, outputs
from penjing.training import checkpoints
from penjing.training.attached import Attached
from penjing.training.distillation import DistillationLoss
from penjing.training.schedule import learning_rate, momentum
from penjing.training.settings import Distill, TrainSettings

CHECKPOINT_EVERY_S = 60.0


@dataclass
class Epoch:
    """Result of one pass over the training images, or of a part of one."""

    epoch: float
    """Number of passes at the epoch's end."""
    loss: float
    """Mean loss over the epoch's steps."""
    score: float
    """Score on the validation images at the epoch's end."""


@dataclass
class TrainResult:
    """Result of a training."""

    history: list[Epoch]
    epochs: float
    """Number of passes over the training images."""
    seconds: float
    score: float
    """Score of the final weights on the validation images."""
    stopped_early: bool
    """Whether the time budget ended the training."""


def train(
    model: nn.Module,
    task: Task,
    settings: TrainSettings,
    techniques: Sequence[Attached] = (),
    *,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    discard: bool = False,
    progress: bool = False,
) -> TrainResult:
    """Train ``model`` in place, on the device it is on, and leave it in evaluation mode.

    Weights that are zero in a layer marked ``sparse`` stay zero.

    Args:
        techniques: techniques attached to the model; each gets the progress after every step.
        teacher: model that ``settings.distill`` learns from.
        checkpoint: file that keeps the state each minute, after each epoch and when Ctrl-C ends the
            training. If it exists the training resumes from there, with the result of an
            uninterrupted one; the model must be as it was at the first start. A longer
            ``time_budget`` is the only setting that may differ: it makes the training longer, even
            a finished one.
        discard: replace a checkpoint of another training, or a damaged one, and say so on standard
            error; for a file that only the caller knows.
        progress: show the progress on standard error.

    Raises:
        PenjingError: the loss is no longer finite; the checkpoint is damaged, of another training, or
            cannot be written; only one of teacher and ``settings.distill`` is given.
        KeyboardInterrupt: Ctrl-C, after the step at hand and the checkpoint are done.
    """
    if (teacher is None) != (settings.distill is None):
        raise PenjingError(
            "Distillation needs both a teacher and the training setting distill; "
            f"only the {'setting' if teacher is None else 'teacher'} was given."
        )
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), _interruptible() as interrupted:
        torch.manual_seed(task.seed * 1_000_003 + settings.seed)
        start = (
            checkpoints.start_of(model, task, settings, techniques, teacher) if checkpoint else {}
        )
        run = _Run(model, task, settings, techniques, teacher)
        if checkpoint is not None and checkpoint.exists():
            _resume(run, checkpoint, start, discard)
        run.start = start
        with run.attended(), bar("training", hidden=not progress) as line:
            _loop(run, checkpoint, interrupted, line)
        if progress:
            say(f"{run.standing}: done in {run.seconds:.0f} s")
    return run.result()


def distill(
    student: nn.Module,
    task: Task,
    teacher: nn.Module,
    *,
    training: TrainSettings | None = None,
    **settings: Any,
) -> nn.Module:
    """Train a copy of ``student`` on the outputs of ``teacher``, and return it; neither is changed.

    Args:
        training: settings of the training; its ``distill`` is replaced by ``settings``.
        settings: settings of ``Distill``.

    Raises:
        PenjingError: the outputs or the named layers of the two models do not fit each other.
    """
    training = training or TrainSettings()
    student = copy.deepcopy(student)
    chosen = training.model_copy(update={"distill": Distill(**settings)})
    train(student, task, chosen, teacher=teacher)
    return student


def seconds_per_epoch(
    model: nn.Module,
    task: Task,
    settings: TrainSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    steps: int = 3,
) -> float:
    """Estimate the seconds that one epoch takes here, from a few steps on a copy of ``model``.

    Args:
        teacher: teacher to distill from in the timed steps.
        steps: number of steps that are timed, after one that is not.
    """
    settings = settings or TrainSettings()
    distill = (settings.distill or Distill()) if teacher is not None else None
    settings = settings.model_copy(update={"distill": distill})
    with torch.random.fork_rng([]):
        run = _Run(copy.deepcopy(model), task, settings, (), teacher)
        with run.attended():
            times = [run.timed(batch) for batch in islice(run.endless(), steps + 1)]
    return sum(times[1:]) / max(len(times) - 1, 1) * run.steps_per_epoch


def _resume(run: _Run, path: Path, start: dict[str, str], discard: bool) -> None:
    """Resume ``run`` from the checkpoint, if it belongs to a training with this ``start``."""
    try:
        tensors, metadata = checkpoints.read(path)
        checkpoints.check_start(path, start, metadata)
    except PenjingError as error:
        if not discard:
            raise
        say(f"The training begins anew: {error}")
    else:
        run.restore(tensors, json.loads(metadata["place"]))


def _loop(run: _Run, checkpoint: Path | None, interrupted: threading.Event, line: Bar) -> None:
    saved = time.monotonic()
    while not run.closed:
        for batch, target in run.rest_of_epoch():
            run.step(batch, target)
            line.update(run.progress, run.standing)
            due = time.monotonic() - saved > CHECKPOINT_EVERY_S
            if checkpoint is not None and (due or interrupted.is_set()):
                run.save(checkpoint)
                saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
        run.close_epoch()
        if checkpoint is not None:
            run.save(checkpoint)
            saved = time.monotonic()
        if interrupted.is_set():
            raise KeyboardInterrupt


@dataclass
class _Place:
    """Position of a training."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    loss: float = 0.0
    """Sum of the losses of this epoch's steps."""
    progress: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    closed: bool = False
    """Whether the last epoch is done, and the model has the averaged weights, if there are any."""


class _Run:
    """A training with its state."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: TrainSettings,
        techniques: Sequence[Attached],
        teacher: nn.Module | None,
    ) -> None:
        self.model, self.task, self.settings, self.techniques = model, task, settings, techniques
        self.teacher = teacher
        self.device = next(model.parameters()).device
        self.place = _Place()
        images = task.size("train")
        # A last batch of one image is left out: batch norm cannot be trained on it.
        self.steps_per_epoch = max(1, images // settings.batch_size)
        if images > settings.batch_size and images % settings.batch_size > 1:
            self.steps_per_epoch += 1
        self.steps = max(1, math.ceil(settings.epochs * self.steps_per_epoch))
        for technique in techniques:
            technique.step(model, 0.0)
        self.distillation = self._distillation()
        self.optimizer = _optimizer(model, self.distillation, settings)
        self.average = _averaged(model) if settings.ema is not None else {}
        self.start: dict[str, str] = {}
        self.started = time.monotonic()

    @property
    def progress(self) -> float:
        return self.place.progress

    @property
    def finished(self) -> bool:
        return self.place.progress >= 1.0

    @property
    def closed(self) -> bool:
        return self.place.closed

    @property
    def mean_loss(self) -> float:
        return self.place.loss / max(self.place.epoch_step, 1)

    @property
    def standing(self) -> str:
        """Loss and score of the training so far, as text."""
        last = self.history[-1:]
        loss = last[0].loss if last and not self.place.epoch_step else self.mean_loss
        score = "".join(f", validation {epoch.score:.4f}" for epoch in last)
        return f"training, loss {loss:.4f}{score}"

    @property
    def history(self) -> list[Epoch]:
        return [Epoch(**entry) for entry in self.place.history]

    @property
    def seconds(self) -> float:
        return self.place.seconds + time.monotonic() - self.started

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Set memory layout, gradient masks and training mode for the block."""
        flat = self.task.example.dim() != 4
        masks = _keep_zeros(self.model)
        if not flat:
            self.model.to(memory_format=torch.channels_last)
        self.model.train()
        try:
            yield
        finally:
            for mask in masks:
                mask.remove()
            if self.distillation is not None:
                self.distillation.close()
            if not flat:
                self.model.to(memory_format=torch.contiguous_format)
            self.model.eval()

    def rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches of this epoch, until the training is finished."""
        if self.finished:
            return
        batches = self.task.batches(
            "train",
            self.settings.batch_size,
            shuffle=True,
            augment=self.settings.augment,
            seed=self.settings.seed * 1009 + self.place.epoch,
        )
        for index, batch in enumerate(batches):
            if index >= self.steps_per_epoch:
                break
            if index >= self.place.epoch_step:
                yield batch
            if self.finished:
                break

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.rest_of_epoch()

    def timed(self, batch: tuple[Tensor, Tensor]) -> float:
        """Make a step; returns its seconds."""
        start = time.perf_counter()
        self._update(*batch)
        return time.perf_counter() - start

    def step(self, batch: Tensor, target: Tensor) -> None:
        """Make one step of the optimizer, of the techniques and of the averaged weights."""
        settings, place = self.settings, self.place
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, place.progress)
            if settings.optimizer == "sgd":
                group["momentum"] = momentum(settings, place.progress)
        place.loss += self._update(batch, target)
        place.step += 1
        place.epoch_step += 1
        place.progress = self._progress()
        for technique in self.techniques:
            technique.step(self.model, place.progress)
        if settings.ema is not None:
            _follow(self.average, self.model, settings.ema, place.step)

    def close_epoch(self) -> None:
        """Validate, and begin the next epoch, or leave the model with its final weights."""
        place = self.place
        if self.finished and self.average:
            _exchange(self.average, self.model)
            for technique in self.techniques:
                technique.step(self.model, 1.0)
            score = evaluate(self.model, self.task, "validation")
        else:
            score = self._score()
        place.closed = self.finished
        done = place.step / self.steps_per_epoch
        place.history.append(asdict(Epoch(epoch=done, loss=self.mean_loss, score=score)))
        place.loss, place.epoch_step = 0.0, 0
        place.epoch += 1

    def result(self) -> TrainResult:
        place, history = self.place, self.history
        return TrainResult(
            history=history,
            epochs=place.step / self.steps_per_epoch,
            seconds=self.seconds,
            score=history[-1].score,
            stopped_early=place.step < self.steps,
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint from which ``restore`` can resume."""
        place = asdict(self.place) | {"seconds": self.seconds}
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        if self.distillation is not None:
            state = self.distillation.state_dict()
            tensors |= {f"distillation.{name}": value for name, value in state.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{name}"] = value
        tensors["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        metadata = {"place": json.dumps(place), "start": json.dumps(self.start)}
        files.save_tensors(path, tensors, metadata | {"checksum": checkpoints.checksum(tensors)})

    def restore(self, tensors: dict[str, Tensor], place: dict[str, Any]) -> None:
        """Resume from a checkpoint that ``save`` wrote."""
        self.place = _Place(**place)
        self.model.load_state_dict(_under("model.", tensors))
        self.average = {k: v.to(self.device) for k, v in _under("average.", tensors).items()}
        if self.distillation is not None:
            self.distillation.load_state_dict(_under("distillation.", tensors))
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, name = key.split(".", 1)
            states.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
        self.started = time.monotonic()
        self._take_budget()

    def _take_budget(self) -> None:
        """Reopen a finished training if the time budget has become longer."""
        self.place.progress = self._progress()
        if self.place.closed and not self.finished:
            self.place.closed = False
            if self.average:
                _exchange(self.average, self.model)

    def _progress(self) -> float:
        done = self.place.step / self.steps
        if self.settings.time_budget is not None:
            done = max(done, self.seconds / self.settings.time_budget)
        return min(1.0, done)

    def _update(self, batch: Tensor, target: Tensor) -> float:
        batch, target = batch.to(self.device), target.to(self.device)
        if batch.dim() == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=_has_bfloat16(self.device)):
            output = outputs.as_floats(self._run(batch))
            loss = self.task.loss(output, target, self.settings.label_smoothing)
            if self.distillation is not None:
                loss = self.distillation(batch, output, loss)
            for technique in self.techniques:
                loss = loss + technique.penalty()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PenjingError(
                f"The training diverged: the loss is {value} at step {self.place.step + 1}; "
                f"lower lr (it is {self.settings.lr:g})."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return value

    def _run(self, batch: Tensor) -> Any:
        try:
            return self.model(batch)
        except ValueError as error:
            if len(batch) > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise PenjingError(
                "A batch norm has one value a channel in a batch of one image, of which it cannot "
                f"learn; give batch_size (it is {self.settings.batch_size}) and training images (there "
                f"are {self.task.size('train')}) of 2 or more."
            ) from error

    def _score(self) -> float:
        if not self.average:
            return evaluate(self.model, self.task, "validation")
        _exchange(self.average, self.model)
        try:
            return evaluate(self.model, self.task, "validation")
        finally:
            _exchange(self.average, self.model)

    def _distillation(self) -> DistillationLoss | None:
        if self.settings.distill is None or self.teacher is None:
            return None
        return DistillationLoss(self.model, self.teacher, self.task, self.settings.distill)


def _optimizer(
    model: nn.Module, distillation: nn.Module | None, settings: TrainSettings
) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    trained += list(distillation.parameters()) if distillation is not None else []
    # One value a channel: biases, norms, scales. Decay would only shrink activations.
    flat = [p for p in trained if p.dim() < 2 or p.numel() == len(p)]
    full = [p for p in trained if p.dim() >= 2 and p.numel() > len(p)]
    groups: list[dict[str, Any]] = [
        {"params": full, "weight_decay": settings.weight_decay},
        {"params": flat, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    start = settings.momentum
    return torch.optim.SGD(groups, lr=settings.lr, momentum=start, nesterov=start > 0)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _keep_zeros(model: nn.Module) -> list[Any]:
    """Hook the weights of sparse layers so that gradients of zeros, and so their momentum, are 0."""
    hooks = []
    for layer in layers.compressible(model).values():
        weight = layers.original(layer)
        if getattr(layer, "sparse", False) and weight.requires_grad:
            mask = (weight.detach() != 0).to(weight.dtype)
            hooks.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
    return hooks


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _average_of(model).items()}


def _average_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to average: parameters and statistics of norms, not masks of techniques."""
    statistics = {
        name: value
        for name, value in model.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    }
    return dict(model.named_parameters()) | statistics


def _follow(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    # Without this, the average would mostly consist of the initial weights early on.
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, value in _average_of(model).items():
            average[name].lerp_(value.detach(), 1 - decay)


def _exchange(average: dict[str, Tensor], model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in _average_of(model).items():
            kept = value.detach().clone()
            value.copy_(average[name])
            average[name].copy_(kept)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event instead of ending a step half-way; a second one ends it at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python delivers signals to the main thread only.
        return

    def handle(_number: int, _frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
