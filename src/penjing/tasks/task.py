"""A task: labelled images in three splits, a loss and a score."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from penjing import identity
from penjing.errors import PenjingError
from penjing.tasks import divergence, outputs
from penjing.tasks.augment import SHIFT
from penjing.tasks.preprocessing import Preprocessing

SplitName = Literal["train", "validation", "test"]
Loss = Callable[[Any, Tensor], Tensor]
Score = Callable[[Any, Tensor], float]
PREPROCESS = "give the preprocessing (size, channels) that the model was trained with"
MISFITS = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError)
"""Errors that models, losses and scores raise on inputs they were not made for."""


class Compared(NamedTuple):
    """One tensor of an output in which two models are compared."""

    tensor: Tensor
    """Tensor, float ``[N, ...]``."""
    scores: bool
    """Whether the tensor holds class scores, with the class axis 1; else it holds plain values."""


class Split(Protocol):
    """Images of one split with their targets."""

    def __len__(self) -> int: ...

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        generator: Generator | None = None,
        shift: float = SHIFT,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 ``[n, C, H, W]`` and targets ``[n, ...]`` of the images at ``order``;
        with a generator, augmented at random, with shifts of up to ``shift`` of the side."""
        ...

    def digest(self) -> bytes:
        """Return the SHA-256 of the split's contents."""
        ...


@dataclass
class Task:
    """Labelled images in up to three splits, and a loss and a score of a model's output on them.

    Techniques and training learn from *train*, the search decides on *validation*, *test* is for
    the report. Make one with ``penjing.tasks.load`` or ``penjing.tasks.from_arrays``.
    """

    classes: list[str]
    preprocessing: Preprocessing
    splits: Mapping[str, Split]
    """Splits by name: ``train``, ``validation`` and, if there is one, ``test``."""
    seed: int = 0
    custom_loss: Loss | None = None
    """Loss ``(output, target) -> scalar``, given the output exactly as the model returns it (a
    tensor, or a dict, tuple or list of tensors); None is cross entropy."""
    custom_score: Score | None = None
    """Score ``(output, target) -> number``, higher is better, given the output of all images in the
    form in which the model returns it; None is top-1 accuracy."""

    @property
    def classifies(self) -> bool:
        """Whether the model's output is class scores, trained by cross entropy."""
        return self.custom_loss is None

    @property
    def has_test(self) -> bool:
        return "test" in self.splits

    @cached_property
    def example(self) -> Tensor:
        """First training image as model input, float32 ``[1, C, H, W]``."""
        return next(self.batches("train", 1))[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes, preprocessing, splits, and the code of loss and score.

        Raises:
            UnidentifiedError: the loss or the score holds an object that cannot be identified, and
                has no attribute ``name``.
        """
        digest = hashlib.sha256(identity.of(self.custom_loss, self.custom_score))
        header = [self.classes, self.preprocessing.model_dump_json(), self.seed]
        digest.update(repr(header).encode())
        for name, images in sorted(self.splits.items()):
            digest.update(name.encode() + images.digest())
        return digest.hexdigest()

    def size(self, split: SplitName) -> int:
        """Return the number of images in ``split``. Raises PenjingError if it does not exist."""
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
        """Yield model input float32 ``[n, C, H, W]`` and targets ``[n, ...]``, classes in int64, once
        for each image.

        Args:
            shuffle: random order, the same for the same ``seed``.
            augment: augment each image at random, as its split does; a number is the largest shift,
                as a share of the side (True: an eighth).
            seed: seed of order and augmentation; a training loop passes its epoch.
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
        """Return calibration images: a fixed random choice of training images as batches of model
        input, float32 ``[n, C, H, W]``."""
        return [batch for batch, _ in self.batches("train", batch_size, limit=images)]

    def loss(self, output: Any, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Compute the loss of ``output``, as the model returns it, for ``target``: a scalar.

        Without a custom loss: cross entropy of the first tensor of ``output``, class scores
        ``[N, classes]`` (or, for two classes, one logit ``[N]`` or ``[N, 1]`` of the second), for
        ``target`` int64 ``[N]``. A custom loss is given ``output`` as it is.

        Raises:
            PenjingError: label smoothing is asked of a custom loss.
        """
        if self.custom_loss is None:
            scores = divergence.columns(outputs.logits(output))
            return F.cross_entropy(scores, target, label_smoothing=label_smoothing)
        if label_smoothing:
            raise PenjingError(
                f"label_smoothing={label_smoothing} needs the task's own cross entropy, "
                "but the task has a custom loss; set label_smoothing to 0."
            )
        return self.custom_loss(output, target)

    def score(self, output: Any, target: Tensor) -> float:
        """Compute the score of the output for all images, as the model returns it; higher is better.
        Without a custom score: top-1 accuracy in [0, 1] of the logits that ``loss`` takes."""
        if self.custom_score is not None:
            return float(self.custom_score(output, target))
        best = divergence.columns(outputs.logits(output)).argmax(dim=1)
        return float((best == target).double().mean())

    def compared(self, output: Any) -> list[Compared]:
        """Return the tensors of ``output`` by which a model is compared with another one.

        Without a custom loss the class scores alone. With one, every tensor of floats with an axis
        of images, where class scores are told from plain values by the task's data: its targets
        are integers and have fewer axes than the tensor, whose axis 1 has one entry a class (or, for
        two classes, one logit). One logit ``[N, 1, ...]`` becomes two columns.

        Raises:
            PenjingError: there is no such tensor.
        """
        if self.classifies:
            return [Compared(divergence.columns(outputs.logits(output)).float(), True)]
        found = []
        for tensor in outputs.tensors(output):
            if tensor.is_floating_point() and tensor.dim():
                scores = self._holds_scores(tensor)
                value = divergence.columns(tensor) if scores else tensor
                found.append(Compared(value.float(), scores))
        if not found:
            raise PenjingError(
                f"The model returns {_form(output)} without floats that one model could be compared "
                "with another by; make its forward return its logits."
            )
        return found

    def divergence(self, output: Any, expected: Any) -> Tensor:
        """Compute the divergence of a model's ``output`` from the output ``expected`` of the original
        for each image, without labels: float ``[N]``, 0 where they are alike.

        It sums over the tensors of ``compared``: for class scores the Kullback-Leibler divergence of
        the softmax (the mean over the positions of a map), for values the mean squared difference
        divided by the variance of the expected ones.
        """
        pairs = zip(self.compared(output), self.compared(expected), strict=True)
        # By rounding, a divergence of 0 may be negative.
        each = [_divergence(found, wanted).clamp(min=0) for found, wanted in pairs]
        return torch.stack(each).sum(dim=0)

    def check(self, model: nn.Module) -> None:
        """Raise PenjingError when ``model`` does not take this task's images, or the task's loss and
        score do not take what the model returns.

        The model runs on two images, in evaluation mode and, on a copy, in training mode.
        """
        images, target = self._two()
        shape = [1, *images.shape[1:]]
        try:
            output = outputs_of(model, iter([(images, target)]))[0]
        except (*MISFITS, AssertionError) as error:
            raise PenjingError(
                f"The model does not take the task's input {shape} ({_reason(error)}); "
                f"{misfit(model, PREPROCESS)}."
            ) from error
        self._check_columns(output)
        if self.custom_score is not None:
            self._check_score(output, target)
        self._check_training(model, images, target)

    def _check_columns(self, output: Any) -> None:
        if not self.classifies:
            return
        shape = outputs.logits(output).shape
        one_logit = len(self.classes) == 2 and shape in ((2,), (2, 1))
        if shape != (2, len(self.classes)) and not one_logit:
            raise PenjingError(
                f"The model's output for one image has shape {[1, *shape[1:]]}, expected "
                f"[1, {len(self.classes)}] for the data's {len(self.classes)} classes; load the "
                f"model with num_classes={len(self.classes)} or use the data it was trained for."
            )

    def _check_score(self, output: Any, target: Tensor) -> None:
        try:
            self.score(output, target)
        except ValueError:
            pass  # Scores such as the area under a curve need more than two images.
        except MISFITS as error:
            raise PenjingError(
                f"The task's score does not take what the model returns, {_form(output)} "
                f"({_reason(error)}); give a score(output, target) for this form."
            ) from error

    def _check_training(self, model: nn.Module, images: Tensor, target: Tensor) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        devices = [device.index] if device.type == "cuda" and device.index is not None else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            try:
                output = copy.deepcopy(model).train()(images.to(device))
            except MISFITS as error:
                raise PenjingError(
                    f"The model does not run in training mode on two images of the task's input "
                    f"{[2, *images.shape[1:]]} ({_reason(error)}); give larger images, or a model "
                    "that can be trained."
                ) from error
            try:
                loss = self.loss(output, target.to(device))
            except MISFITS as error:
                raise PenjingError(
                    f"The task's loss does not take what the model returns in training mode, "
                    f"{_form(output)} ({_reason(error)}); give a loss(output, target) for this form, "
                    "or load the model without auxiliary heads."
                ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise PenjingError(
                f"The task's loss gives {found:.60}, expected one number, a tensor []."
            )

    def _two(self) -> tuple[Tensor, Tensor]:
        images, target = next(self.batches("train", 2))
        if len(images) == 1:
            return torch.cat([images, images]), torch.cat([target, target])
        return images, target

    @cached_property
    def _target(self) -> Tensor:
        return next(self.batches("train", 1))[1]

    def _holds_scores(self, tensor: Tensor) -> bool:
        target, classes = self._target, len(self.classes)
        whole = not (target.is_floating_point() or target.is_complex())
        width = 1 if tensor.dim() == 1 else tensor.shape[1]
        if classes == 2 and width == 1:
            return whole
        return whole and target.dim() < tensor.dim() and width == classes >= 2

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
    """Compute the task's score of a PyTorch ``model`` in evaluation mode, on the model's device.

    Args:
        limit: score only so many images, always the same random ones.
    """
    return task.score(*outputs_of(model, task.batches(split, batch_size, limit=limit)))


def outputs_of(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Any, Tensor]:
    """Return the output of ``model`` in evaluation mode for the images of all ``batches``, in the
    form in which the model returns it, on the CPU, and the targets."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    found, targets = [], []
    with outputs.evaluating(model):
        for batch, target in batches:
            output = model(batch.to(device))
            found.append(outputs.like(output, [o.cpu() for o in outputs.tensors(output)]))
            targets.append(target)
    return outputs.concatenated(found), torch.cat(targets)


def _divergence(found: Compared, expected: Compared) -> Tensor:
    if expected.scores:
        return divergence.of_scores(found.tensor, expected.tensor)
    spread = divergence.spread_of(expected.tensor)
    return divergence.of_values(found.tensor, expected.tensor, spread)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return (
        f"{type(error).__name__}: {lines[0]}"
        if isinstance(error, KeyError)
        else (lines[0] or type(error).__name__)
    )


def _form(output: Any) -> str:
    """Describe ``output`` for messages: its type and the shapes of its tensors."""
    shapes = [str(list(tensor.shape)) for tensor in outputs.tensors(output)]
    kind = "" if isinstance(output, Tensor) else f"a {type(output).__name__} of "
    return f"{kind}{', '.join(shapes[:8])}"


def misfit(model: nn.Module, otherwise: str) -> str:
    """Return advice on ``model``, which does not run on float32 images: ``otherwise`` if all its
    parameters are float32, else to convert them."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return otherwise
    found = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return f"its parameters are {found}, expected float32: call .float() on the model first"
