"""What a model is for: data in three splits, a loss and a score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from penjing.errors import PenjingError
from penjing.tasks.augment import SHIFT
from penjing.tasks.preprocessing import Preprocessing

SplitName = Literal["train", "validation", "test"]
Loss = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor], float]


class Split(Protocol):
    """Images of one split with what is known of them."""

    def __len__(self) -> int: ...

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        generator: Generator | None = None,
        shift: float = SHIFT,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 ``[n, C, H, W]`` and targets ``[n, ...]`` of the images at ``order``; with a
        generator, changed at random as training images are, shifts by up to a share of the side."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of what makes the split what it is."""
        ...


@dataclass
class Task:
    """Labelled images in up to three splits, and how a model's output on them is judged.

    Techniques and training learn from *train*, the search decides on *validation*, *test* is for
    the report. Make one with ``penjing.tasks.load`` or ``penjing.tasks.from_arrays``.
    """

    classes: list[str]
    preprocessing: Preprocessing
    splits: Mapping[str, Split]
    """``train``, ``validation`` and, if there is one, ``test``."""
    seed: int = 0
    custom_loss: Loss | None = None
    """``(output, target) -> scalar``; None is cross entropy."""
    custom_score: Score | None = None
    """``(output, target) -> number``, higher is better; None is top-1 accuracy."""

    @property
    def has_test(self) -> bool:
        return "test" in self.splits

    @cached_property
    def example(self) -> Tensor:
        """The first training image as the model sees it, float32 ``[1, C, H, W]``."""
        return next(self.batches("train", 1))[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes, preprocessing, splits, loss and score."""
        digest = hashlib.sha256()
        judged_by = [getattr(f, "__qualname__", f) for f in (self.custom_loss, self.custom_score)]
        header = [self.classes, self.preprocessing.model_dump_json(), self.seed, judged_by]
        digest.update(repr(header).encode())
        for name, images in sorted(self.splits.items()):
            digest.update(name.encode() + images.digest())
        return digest.hexdigest()

    def size(self, split: SplitName) -> int:
        """Number of images. Raises PenjingError when the split does not exist."""
        return len(self._images(split))

    def batches(
        self,
        split: SplitName,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: bool | float = False,
        seed: int = 0,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass: model input float32 ``[n, C, H, W]`` and targets, of classes int64 ``[n]``.

        Args:
            shuffle: random order, the same for the same ``seed``.
            augment: change each image at random, as its split does; a number is the largest shift,
                as a share of the side (True: an eighth).
            seed: of order and augmentation; a training loop passes its epoch.
            limit: read only so many images, always the same random ones.

        Raises:
            PenjingError: the split does not exist, or an image cannot be read.
        """
        images = self._images(split)
        order = self._choose(len(images), limit)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + seed)
        if shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        shift = SHIFT if augment is True else float(augment)
        changes = generator if augment else None
        for pixels, targets in images.batches(order, batch_size, changes, shift):
            yield self.preprocessing.normalize(pixels), targets

    def calibration(self, images: int = 512, batch_size: int = 64) -> list[Tensor]:
        """Model inputs float32 ``[n, C, H, W]`` of a fixed random choice of training images."""
        return [batch for batch, _ in self.batches("train", batch_size, limit=images)]

    def loss(self, output: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Scalar loss of the model's ``output`` ``[N, classes]`` for ``target`` int64 ``[N]``.

        Raises:
            PenjingError: label smoothing is asked of a custom loss.
        """
        if self.custom_loss is None:
            return F.cross_entropy(output, target, label_smoothing=label_smoothing)
        if label_smoothing:
            raise PenjingError(
                f"label_smoothing={label_smoothing} needs the task's own cross entropy, "
                "but the task has a custom loss; set label_smoothing to 0."
            )
        return self.custom_loss(output, target)

    def score(self, output: Tensor, target: Tensor) -> float:
        """Score of all collected outputs ``[N, classes]``; higher is better, top-1 in [0, 1]."""
        if self.custom_score is not None:
            return float(self.custom_score(output, target))
        return float((output.argmax(dim=1) == target).double().mean())

    def check(self, model: nn.Module) -> None:
        """Raise PenjingError when ``model`` does not take this task's input, or its output does not
        have one column a class (not asked with a custom loss)."""
        shape = list(self.example.shape)
        try:
            output = outputs_of(model, iter([(self.example, torch.zeros(1))]))[0]
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PenjingError(
                f"The model does not take the task's input {shape} ({reason}); give the "
                "preprocessing (size, channels) that the model was trained with."
            ) from error
        if self.custom_loss is None and output.shape != (1, len(self.classes)):
            raise PenjingError(
                f"The model's output for one image has shape {list(output.shape)}, expected "
                f"[1, {len(self.classes)}] for the data's {len(self.classes)} classes; load the "
                f"model with num_classes={len(self.classes)} or use the data it was trained for."
            )

    def _images(self, split: SplitName) -> Split:
        if split not in self.splits:
            raise PenjingError(
                f"The task has no {split} images, only {', '.join(self.splits)}; "
                f"add a {split}/ part to the data."
            )
        return self.splits[split]

    def _choose(self, count: int, limit: int | None) -> Tensor:
        if limit is None or limit >= count:
            return torch.arange(count)
        # At random because folders are sorted by class.
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(count, generator=generator)[:limit].sort().values


def evaluate(
    model: nn.Module,
    task: Task,
    split: SplitName,
    limit: int | None = None,
    batch_size: int = 128,
) -> float:
    """The task's score of a PyTorch ``model`` in evaluation mode, on the model's device.

    Args:
        limit: score only so many images, always the same random ones.
    """
    return task.score(*outputs_of(model, task.batches(split, batch_size, limit=limit)))


def outputs_of(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The outputs of ``model`` in evaluation mode on all ``batches``, and their targets."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    outputs, targets = [], []
    try:
        with torch.no_grad():
            for batch, target in batches:
                outputs.append(model(batch.to(device)).cpu())
                targets.append(target)
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(outputs), torch.cat(targets)
