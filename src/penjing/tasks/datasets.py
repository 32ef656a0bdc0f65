"""The data layouts people have: image folders, torchvision's data sets, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from penjing.errors import PenjingError
from penjing.tasks.images import Images
from penjing.tasks.preprocessing import (
    CIFAR,
    FASHION_MNIST,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MNIST,
    Preprocessing,
)
from penjing.tasks.task import Loss, Score, Task

TORCHVISION = {
    "CIFAR10": CIFAR,
    "CIFAR100": CIFAR,
    "MNIST": MNIST,
    "FashionMNIST": FASHION_MNIST,
}
LARGEST_VALIDATION = 5000
LARGEST_IN_MEMORY = 2**30
"""Preprocessed pixels of all splits together, bytes, up to which they stay in memory."""

Sources = Sequence[Path] | NDArray[np.uint8]
Labelled = tuple[Sources, Tensor]
Arrays = tuple[NDArray[np.uint8], NDArray[np.integer]]


def load(
    data: str | Path,
    preprocessing: Preprocessing | None = None,
    *,
    root: str | Path | None = None,
    validation: float | int = 0.1,
    seed: int = 0,
    loss: Loss | None = None,
    score: Score | None = None,
) -> Task:
    """A classification task from data on disk. Nothing is downloaded.

    Args:
        data: a folder with ``train/CLASS/*.jpg`` and optionally ``val/`` (or ``validation/``) and
            ``test/`` of the same form, or ``torchvision:`` and one of MNIST, FashionMNIST, CIFAR10,
            CIFAR100.
        preprocessing: what the model expects, see ``penjing.models.preprocessing``. None takes a
            torchvision data set as it is, and a folder at the short side of its first image (at
            most 224 px) with ImageNet's mean and deviation.
        root: folder of a ``torchvision:`` data set, as torchvision lays it out.
        validation: without a validation part, so many training images are split off for it at
            random: a share (at most 5000 images), or a number.
        seed: of that split, of ``calibration`` and of ``limit``.
        loss: ``(output, target) -> scalar`` instead of cross entropy.
        score: ``(output, target) -> number`` instead of top-1; higher is better.

    Raises:
        PenjingError: the folder or its train part is missing, a class has no images, a class of
            another part is not one of train, an unknown data set.
    """
    kind, _, name = str(data).partition(":")
    if kind == "torchvision":
        classes, parts = _torchvision(name, root)
        preprocessing = preprocessing or TORCHVISION[name]
    else:
        classes, parts = _image_folder(Path(data))
        preprocessing = preprocessing or _as_first_image(parts["train"][0][0])
    if "validation" not in parts:
        _split_off(parts, "validation", validation, seed)
    folder = None if kind == "torchvision" else Path(data)
    return _task(classes, parts, preprocessing, seed, loss, score, folder)


def from_arrays(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    *,
    validation: Arrays | float | int = 0.1,
    test: Arrays | float | int = 0.1,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    score: Score | None = None,
) -> Task:
    """A classification task from images in memory.

    Args:
        images: training images, uint8 ``[N, H, W, C]`` or grey ``[N, H, W]``.
        labels: their classes, integers ``[N]`` from 0.
        validation, test: images and labels; or the share (at most 5000 images) or number of the
            training images to split off at random.
        classes: names of the classes; None names them ``"0"``, ``"1"``, ...
        preprocessing: None takes the images as they are, in their own size, scaled to [-1, 1].
        seed, loss, score: as in ``load``.

    Raises:
        PenjingError: an array of another type or shape, labels that do not fit.
    """
    parts: dict[str, Labelled] = {"train": _checked("train", images, labels)}
    for name, part in (("test", test), ("validation", validation)):
        if isinstance(part, tuple):
            parts[name] = _checked(name, *part)
        else:
            _split_off(parts, name, part, seed)
    largest = max(int(part[1].max()) for part in parts.values())
    names = list(classes) if classes is not None else [str(i) for i in range(largest + 1)]
    if largest >= len(names):
        raise PenjingError(f"Label {largest} is out of range for {len(names)} classes.")
    channels = images.shape[3] if images.ndim == 4 else 1
    half = (0.5,) * channels
    preprocessing = preprocessing or Preprocessing(
        size=images.shape[1:3], channels=channels, mean=half, std=half
    )
    return _task(names, parts, preprocessing, seed, loss, score, None)


def _task(
    classes: list[str],
    parts: dict[str, Labelled],
    preprocessing: Preprocessing,
    seed: int,
    loss: Loss | None,
    score: Score | None,
    root: Path | None,
) -> Task:
    images = sum(len(labels) for _, labels in parts.values())
    bytes_each = preprocessing.channels * preprocessing.height * preprocessing.width
    keep = images * bytes_each <= LARGEST_IN_MEMORY
    # Grey images are mostly characters and X-rays, whose mirror image is another thing.
    sources = parts["train"][0]
    grey = isinstance(sources, np.ndarray) and (sources.ndim == 3 or sources.shape[3] == 1)
    mirrored = preprocessing.channels == 3 and not grey
    splits = {
        name: Images(sources, labels, preprocessing, keep=keep, root=root, mirrored=mirrored)
        for name, (sources, labels) in parts.items()
    }
    return Task(classes, preprocessing, splits, seed, loss, score)


def _split_off(parts: dict[str, Labelled], name: str, amount: float | int, seed: int) -> None:
    sources, labels = parts["train"]
    total = len(labels)
    share = isinstance(amount, float)
    count = min(round(amount * total), LARGEST_VALIDATION) if share else int(amount)
    if not 0 < count < total:
        raise PenjingError(
            f"{name}={amount} splits {count} of {total} training images off for {name}; "
            f"give a share between 0 and 1, or a number from 1 to {total - 1}."
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    taken, left = order[:count].sort().values, order[count:].sort().values
    parts[name] = (_select(sources, taken), labels[taken])
    parts["train"] = (_select(sources, left), labels[left])


def _select(sources: Sources, indices: Tensor) -> Sources:
    if isinstance(sources, np.ndarray):
        return sources[indices.numpy()]
    return [sources[index] for index in indices.tolist()]


def _image_folder(root: Path) -> tuple[list[str], dict[str, Labelled]]:
    if not root.is_dir():
        raise PenjingError(f"{root}: no such folder; give one with train/CLASS/*.jpg in it.")
    folders = {name: root / name for name in ("train", "test") if (root / name).is_dir()}
    validation = [root / name for name in ("val", "validation") if (root / name).is_dir()]
    if len(validation) == 2:
        raise PenjingError(f"{root}: has both val/ and validation/; keep one of them.")
    if validation:
        folders["validation"] = validation[0]
    if "train" not in folders:
        raise PenjingError(f"{root}: has no train/ folder; expected train/CLASS/*.jpg.")
    classes = [folder.name for folder in _class_folders(folders["train"])]
    if len(classes) < 2:
        raise PenjingError(
            f"{folders['train']}: has {len(classes)} class folders, at least 2 are needed."
        )
    return classes, {name: _folder_part(folder, classes) for name, folder in folders.items()}


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _folder_part(folder: Path, classes: list[str]) -> Labelled:
    positions = {name: index for index, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    for class_folder in _class_folders(folder):
        if class_folder.name not in positions:
            raise PenjingError(
                f"{class_folder}: class {class_folder.name!r} is not one of the "
                f"{len(classes)} classes in train/; rename it or add it there."
            )
        found = sorted(p for p in class_folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise PenjingError(f"{class_folder}: class {class_folder.name!r} has no images.")
        paths += found
        labels += [positions[class_folder.name]] * len(found)
    if not paths:
        raise PenjingError(f"{folder}: has no class folders; expected CLASS/*.jpg in it.")
    return paths, torch.tensor(labels)


def _as_first_image(path: Path) -> Preprocessing:
    try:
        with Image.open(path) as image:
            side = min(*image.size, 224)
    except OSError as error:
        raise PenjingError(f"{path}: cannot be read as an image ({error}).") from error
    return Preprocessing(size=side, resize=side, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _torchvision(name: str, root: str | Path | None) -> tuple[list[str], dict[str, Labelled]]:
    if name not in TORCHVISION:
        raise PenjingError(
            f"torchvision:{name} is not a known data set; "
            f"known are {', '.join(TORCHVISION)}, and any folder with train/CLASS/*.jpg."
        )
    if root is None:
        raise PenjingError(f"torchvision:{name} needs root, the folder that holds the data set.")
    kind = getattr(torchvision_datasets, name)
    try:
        # CIFAR's files are pickles: torchvision reads them only if their MD5 is the published one.
        sets = {"train": kind(root, train=True), "test": kind(root, train=False)}
    except RuntimeError as error:
        raise PenjingError(
            f"{root}: torchvision finds no {name} there ({error}); "
            "penjing does not download, put the data set there first."
        ) from error
    parts: dict[str, Labelled] = {
        part: (np.asarray(found.data), torch.as_tensor(found.targets))
        for part, found in sets.items()
    }
    return list(sets["train"].classes), parts


def _checked(name: str, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Labelled:
    channels = images.shape[3] if images.ndim == 4 else 1
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels not in (1, 3):
        raise PenjingError(
            f"The {name} images are {images.dtype} {list(images.shape)}; "
            "expected uint8 [N, H, W, 1 or 3] or [N, H, W]."
        )
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(labels):
        raise PenjingError(
            f"The {name} labels are {labels.dtype} {list(labels.shape)}; "
            f"expected integers [{len(images)}], one an image."
        )
    if labels.min() < 0:
        raise PenjingError(f"The {name} labels start at {labels.min()}; expected 0 or more.")
    return images, torch.from_numpy(labels.astype(np.int64))
