"""Build a detector from boxes on images: design, training, quantization, threshold, card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing import recipe as recipes
from penjing.attention import MOST_EPOCHS, STEPS
from penjing.attention.decoding import Decoding, Threshold, decode
from penjing.attention.loss import detection_loss
from penjing.attention.pixel_input import PixelInput
from penjing.devices import artifact, measurement
from penjing.devices.artifact import Card
from penjing.devices.local import Local
from penjing.errors import PenjingError
from penjing.models.heat_map import COARSEST, LARGEST_SIDE, SMALLEST_SIDE, HeatMapNet, member
from penjing.net.input_quantizer import InputQuantizer
from penjing.recipe import Recipe, Stage
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Preprocessing, Task, coco, detection_metrics, outputs_of
from penjing.tasks.boxes import BoxImages
from penjing.tasks.coco import Annotated
from penjing.tasks.frames import read
from penjing.techniques.quantize import Quantize
from penjing.training import TrainSettings

Boxes = NDArray[np.floating]

SMALLEST_OBJECT = 5.0
"""Short side that nearly all objects should have in the input, px."""
NEARLY_ALL = 5.0
"""Percentile of the objects' sizes that decides the input's size."""
VALIDATION = 0.1
BATCH = 16
COLOUR_SAMPLE = 64
"""Number of images that are checked for colours."""
FIRST_SHARE = 0.15
"""Share of the passes before the detector's errors on the training images become hard negatives."""
HARD_NEGATIVES = 1.0
"""Largest average number of hard negatives an image."""
BESIDE = 0.1
"""Largest IoU of a hard negative with a true box."""
FALSE_POSITIVES = 0.1
"""False positives an image, on the validation images, at which the threshold is set."""
QUANTIZED_SHARE = 0.1
"""Share of the passes with quantization-aware training."""


def train(
    data: str | Path,
    images: str | Path | None = None,
    *,
    folder: str | Path,
    validation: str | Path | None = None,
    validation_images: str | Path | None = None,
    test: str | Path | None = None,
    test_images: str | Path | None = None,
    budget: int = 45_000,
    epochs: float | None = None,
    seed: int = 0,
    threads: int = 1,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Card:
    """Train a detector from scratch on boxes, with 8-bit quantization-aware training at the end, and
    write it. The same call resumes an interrupted one.

    Args:
        data: training boxes as COCO JSON, see ``coco.read``.
        images: folder of the images; None is the folder of the JSON file that lists them.
        folder: gets ``model.onnx`` and ``model.penjing`` with decoding inside, and ``card.json``.
        validation, test: boxes on other images; without validation a tenth of the training images is
            split off. The card's score (AP50) is that on the test images, if there are any.
        validation_images, test_images: folders of these images; None is ``images``.
        budget: largest size of ``model.penjing``, bytes.
        epochs: passes over the training images in all; None takes as many as make ``STEPS``
            steps, at most ``MOST_EPOCHS``.
        seed: random seed of the split, the initial weights and the order of the images.
        threads: threads of the runtime, for the latency in the card.
        device: device to train on.
        progress: show progress bars on standard error.

    Raises:
        PenjingError: data that cannot be read, a part without any box, a budget under 12,000 bytes.
    """
    given = {
        "train": (data, images),
        "validation": (validation, validation_images or images),
        "test": (test, test_images or images),
    }
    splits = _read(given, seed)
    height, width = input_size(splits["train"])
    design = member(budget, height, width, 1 if all_grey(splits["train"]) else 3)
    task = task_of(splits, height, width, design.channels)
    torch.manual_seed(seed)
    net = HeatMapNet(design).to(device)
    steps = recipe(task.size("train"), epochs, seed)
    first, rest = Recipe(stages=steps.stages[:1]), Recipe(stages=steps.stages[1:])
    cache = Path(folder) / "cache"
    begun = recipes.compress(net, task, first, cache=cache, progress=progress)
    task = task_of(splits, height, width, design.channels, hard_negatives(begun, task))
    small = recipes.compress(begun, task, rest, cache=cache, progress=progress)
    align_pixels(small.cpu())
    threshold = _threshold(small, task, Path(folder) / "model.onnx")
    split = "test" if task.has_test else "validation"
    card = artifact.build(
        small,
        task,
        Path(folder),
        recipe=steps.to_dict(),
        split=split,
        finish=[Decoding(), PixelInput(), Threshold(threshold)],
        figures=lambda path: figures(*measurement.outputs(path, task, split), threshold),
        device=Local(threads),
    )
    card.notes += _notes(card, splits["train"], height, width, budget)
    artifact.write(card, Path(folder))
    return card


def task_of(
    splits: dict[str, list[Annotated]],
    height: int,
    width: int,
    channels: int,
    hard: list[Boxes] | None = None,
) -> Task:
    """Make a detection task: targets are boxes, the loss compares heat maps, the score is AP50.

    ``hard`` are the hard negatives of each training image, see ``BoxImages``.
    """
    parts = {name: BoxImages(part, height, width, channels) for name, part in splits.items()}
    parts["train"] = BoxImages(splits["train"], height, width, channels, hard)
    zero, one = (0.0,) * channels, (1.0,) * channels
    plain = Preprocessing(size=(height, width), channels=channels, mean=zero, std=one)
    return Task(["object"], plain, parts, custom_loss=detection_loss, custom_score=score)


def hard_negatives(model: nn.Module, task: Task) -> list[Boxes]:
    """Find the hard negatives of each training image, boxes ``[n, 4]`` that ``model`` wrongly detects.

    They are those with the highest scores, at most one an image on average, away from all true boxes:
    an inaccurate box of an object is no negative.
    """
    maps, target = outputs_of(model, task.batches("train", BATCH))
    found, _ = boxes_in(decode(maps), target)
    beside = []
    for boxes, known in zip(found, target.numpy(), strict=True):
        near = detection_metrics.overlaps(boxes, known[known[:, 4] >= 0, :4])
        beside.append(boxes[(near <= BESIDE).all(axis=1)])
    scores = np.sort(np.concatenate([boxes[:, 4] for boxes in beside]))[::-1]
    most = int(HARD_NEGATIVES * len(beside))
    lowest = scores[most] if most < len(scores) else 0.0
    return [boxes[boxes[:, 4] > lowest, :4] for boxes in beside]


def score(output: Tensor, target: Tensor) -> float:
    """Compute AP50 of maps ``[N, 5, h, w]`` or detections ``[N, K, 5]`` for boxes ``[N, m, 5]``."""
    found = decode(output) if output.dim() == 4 else output
    return detection_metrics.average_precision(*boxes_in(found, target))["AP50"]


def figures(detections: Tensor, target: Tensor, threshold: float) -> dict[str, float]:
    """Compute the figures of a detector's card: COCO's AP, recall at 0.1 false positives an image, and
    recall and false positives an image at ``threshold``, from detections ``[N, K, 5]`` and boxes
    ``[N, m, 5]``."""
    found, truth = boxes_in(detections, target)
    recall, _ = detection_metrics.recall_at(found, truth, FALSE_POSITIVES)
    kept = [boxes[boxes[:, 4] >= threshold] for boxes in found]
    right, wrong = detection_metrics.count(kept, truth)
    return detection_metrics.average_precision(found, truth) | {
        f"recall at {FALSE_POSITIVES} false positives an image": recall,
        "threshold": threshold,
        "recall at the threshold": right / sum(len(real) for real in truth),
        "false positives an image at the threshold": wrong / len(truth),
    }


def boxes_in(detections: Tensor, target: Tensor) -> tuple[list[Boxes], list[Boxes]]:
    """Return the detected boxes ``[n, 5]`` and the true ones ``[m, 4]`` of each image.

    Detections in a crowd that match no true box are left out.
    """
    found = [part[part[:, 4] > 0].numpy() for part in detections]
    truth = [part[part[:, 4] == 1, :4].numpy() for part in target]
    crowds = [part[part[:, 4] == 0, :4].numpy() for part in target]
    kept = [detection_metrics.outside(*parts) for parts in zip(found, truth, crowds, strict=True)]
    return kept, truth


def recipe(images: int, epochs: float | None, seed: int) -> Recipe:
    """Make the recipe: training in float, before and after hard negatives are known, then 8-bit
    quantization-aware training."""
    total = epochs or min(STEPS * BATCH / max(images, BATCH), MOST_EPOCHS)
    settings = TrainSettings(
        epochs=total * FIRST_SHARE,
        batch_size=BATCH,
        optimizer="adamw",
        lr=0.03,
        weight_decay=0.02,
        warmup=0.05,
        ema=0.998,
        seed=seed,
    )
    share = 1 - FIRST_SHARE - QUANTIZED_SHARE
    long = settings.model_copy(update={"epochs": total * share})
    last = settings.model_copy(update={"epochs": total * QUANTIZED_SHARE, "lr": 0.00003})
    return Recipe(
        name="detector",
        stages=[
            Stage(train=settings),
            Stage(train=long),
            Stage(techniques=[Quantize()], train=last),
        ],
    )


def input_size(images: Sequence[Annotated]) -> tuple[int, int]:
    """Choose the height and width, px, of the smallest input in which nearly all objects can be seen.

    Its aspect is that of the median image. All but one in twenty objects have at least 5 pixels on
    their short side in it, or it is as large as it can be.
    """
    aspect = float(np.median([image.width / image.height for image in images]))
    sizes = np.concatenate([_shares(image) for image in images if len(image.boxes)])
    for longest in range(SMALLEST_SIDE, LARGEST_SIDE + 1, COARSEST):
        width = longest if aspect >= 1 else _multiple(longest * aspect)
        height = longest if aspect <= 1 else _multiple(longest / aspect)
        short = (sizes * (width, height)).min(axis=1)
        if np.percentile(short, NEARLY_ALL) >= SMALLEST_OBJECT:
            break
    return height, width


def all_grey(images: Sequence[Annotated]) -> bool:
    """Whether the first images have no colours, so that a grey detector is enough."""
    frames = (read(image.path) for image in images[:COLOUR_SAMPLE])
    return all((frame == frame[..., :1]).all() for frame in frames)


def align_pixels(model: nn.Module) -> None:
    """Set the first layer's input scale to 1/255 and zero point to 0, so that pixels are its
    integers."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.input_quantizer = InputQuantizer(0.0, 1.0, bits=8)
    first.input_quantizer.freeze()


def _read(
    given: dict[str, tuple[str | Path | None, str | Path | None]], seed: int
) -> dict[str, list[Annotated]]:
    """Read the images of each split, from its JSON file and the folder of its images."""
    splits = {
        name: coco.read(file, images) for name, (file, images) in given.items() if file is not None
    }
    if "validation" not in splits:
        order = np.random.default_rng(seed).permutation(len(splits["train"]))
        count = max(1, round(VALIDATION * len(order)))
        whole = splits["train"]
        splits["validation"] = [whole[i] for i in order[:count]]
        splits["train"] = [whole[i] for i in order[count:]]
    for name, part in splits.items():
        if not any((image.boxes[:, 4] == 1).any() for image in part):
            raise PenjingError(
                f"the {len(part)} {name} images of {given[name][0] or given['train'][0]} have no "
                "boxes at all; add images with boxes, or name another file."
            )
    return splits


def _threshold(model: nn.Module, task: Task, path: Path) -> float:
    """Find the score at which the file, not the PyTorch model, has ``FALSE_POSITIVES``."""
    finish = [Decoding(), PixelInput()]
    batches = task.calibration(artifact.CALIBRATION)
    export(model, task.example, path, calibration=batches, finish=finish)
    detections, target = measurement.outputs(path, task, "validation")
    return detection_metrics.recall_at(*boxes_in(detections, target), FALSE_POSITIVES)[1]


def _notes(
    card: Card, images: Sequence[Annotated], height: int, width: int, budget: int
) -> list[str]:
    """Write warnings for the user about the detector's size and small objects."""
    notes = []
    if card.packed_bytes > budget:
        notes.append(f"the packed file has {card.packed_bytes:,} bytes, the budget is {budget:,}")
    sizes = np.concatenate([_shares(image) for image in images])
    small = float(((sizes * (width, height)).min(axis=1) < SMALLEST_OBJECT).mean())
    if small > NEARLY_ALL / 100:
        notes.append(
            f"{small:.0%} of the objects have less than {SMALLEST_OBJECT:.0f} of the input's pixels "
            "on their short side and will mostly be missed; bring the camera nearer, or give the "
            "detector a part of the frame"
        )
    return notes


def _shares(image: Annotated) -> NDArray[np.float32]:
    """Return width and height of each object as shares of the image's, ``[m, 2]``."""
    objects = image.boxes[image.boxes[:, 4] == 1]
    return objects[:, 2:4] - objects[:, :2]


def _multiple(side: float) -> int:
    """Round ``side`` up to a size that the network takes."""
    whole = math.ceil(side / COARSEST - 0.01) * COARSEST
    return min(max(whole, SMALLEST_SIDE), LARGEST_SIDE)
