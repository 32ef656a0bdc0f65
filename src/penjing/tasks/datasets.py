"""Tasks from image folders, torchvision's data sets and arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets as torchvision_datasets

from penjing.errors import PenjingError
from penjing.progress import say
from penjing.tasks import image_files
from penjing.tasks.images import Images
from penjing.tasks.preprocessing import (
    CIFAR,
    FASHION_MNIST,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MNIST,
    Preprocessing,
)
from penjing.tasks.task import Loss, Score, Split, Task

TORCHVISION = {
    "CIFAR10": CIFAR,
    "CIFAR100": CIFAR,
    "MNIST": MNIST,
    "FashionMNIST": FASHION_MNIST,
}
PARTS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
"""Names of the folders that each part may be in."""
LARGEST_VALIDATION = 5000
LOOKED_AT = 8
"""Number of images in which unused bits are looked for."""
DEEP_ENDINGS = (".png", ".tif", ".tiff", ".pgm", ".jp2")
MANY_CLASSES = 10
"""Largest number of classes that are listed one by one."""
LARGEST_IN_MEMORY = 2**30
"""Largest total of preprocessed pixels of all splits that stays in memory, bytes."""

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
    """Load a classification task from disk. Nothing is downloaded.

    Files and folders that are not read are named on standard error, and so are classes that a split
    leaves without images. Images are read by ``penjing.tasks.image_files``.

    Args:
        data: a folder with ``train/CLASS/*.jpg`` and optionally ``val/`` (or ``valid/`` or
            ``validation/``) and ``test/`` of the same form, or ``torchvision:`` and one of MNIST,
            FashionMNIST, CIFAR10, CIFAR100.
        preprocessing: the model's, see ``penjing.models.preprocessing``. None takes a
            torchvision data set as it is, and a folder at the short side of its first image (at
            most 224 px) with ImageNet's mean and deviation.
        root: folder of a ``torchvision:`` data set, as torchvision lays it out.
        validation: without a validation part, so many training images are split off for it at
            random: a share (at most 5000 images), or a number. One image of each class stays in
            train, and each class of which half an image or more falls to validation has one there.
        seed: random seed of that split, of ``calibration`` and of ``limit``.
        loss: ``(output, target) -> scalar`` instead of cross entropy.
        score: ``(output, target) -> number`` instead of top-1; higher is better.

    Raises:
        PenjingError: the folder or its train part is missing, there are two validation parts, a class
            has no images, a class of another part is not one of train, an unknown data set, a
            split that would take a class's last training image.
    """
    kind, _, name = str(data).partition(":")
    if kind == "torchvision":
        classes, parts = _torchvision(name, root)
        preprocessing = preprocessing or TORCHVISION[name]
    else:
        classes, parts = _image_folder(Path(data))
        preprocessing = preprocessing or _as_first_image(parts["train"][0][0])
    if "validation" not in parts:
        _split_off(parts, "validation", validation, seed, classes)
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
    """Make a classification task from images in memory.

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
    asked = {"test": test, "validation": validation}
    given = {"train": (images, labels)} | {n: p for n, p in asked.items() if isinstance(p, tuple)}
    parts = {name: _checked(name, *part) for name, part in given.items()}
    largest = max(int(part[1].max()) for part in parts.values())
    names = list(classes) if classes is not None else [str(i) for i in range(largest + 1)]
    if largest >= len(names):
        raise PenjingError(f"Label {largest} is out of range for {len(names)} classes.")
    for name, amount in asked.items():
        if not isinstance(amount, tuple):
            _split_off(parts, name, amount, seed, names)
    channels = images.shape[3] if images.ndim == 4 else 1
    half = (0.5,) * channels
    preprocessing = preprocessing or Preprocessing(
        size=images.shape[1:3], channels=channels, mean=half, std=half
    )
    return _task(names, parts, preprocessing, seed, loss, score, None)


def describe(task: Task) -> str:
    """Return one line with the number of images of each class in each part; the range if there are
    many classes."""
    parts = [(name, task.splits[name]) for name in PARTS if name in task.splits]
    return "; ".join(_described(name, part, task.classes) for name, part in parts)


def _described(name: str, part: Split, classes: list[str]) -> str:
    text = f"{name} {len(part):,} images"
    if not isinstance(part, Images):
        return text
    counts = torch.bincount(part.labels, minlength=len(classes)).tolist()
    if len(classes) <= MANY_CLASSES:
        of_each = zip(classes, counts, strict=True)
        return f"{text} ({', '.join(f'{label} {count:,}' for label, count in of_each)})"
    return f"{text} ({len(classes):,} classes, {min(counts):,} to {max(counts):,} of each)"


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
    # Grey images are mostly characters and X-rays, whose mirror images have another meaning.
    sources = parts["train"][0]
    grey = isinstance(sources, np.ndarray) and (sources.ndim == 3 or sources.shape[3] == 1)
    mirrored = preprocessing.channels == 3 and not grey
    splits = {
        name: Images(sources, labels, preprocessing, keep=keep, root=root, mirrored=mirrored)
        for name, (sources, labels) in parts.items()
    }
    return Task(classes, preprocessing, splits, seed, loss, score)


def _split_off(
    parts: dict[str, Labelled], name: str, amount: float | int, seed: int, classes: list[str]
) -> None:
    sources, labels = parts["train"]
    total = len(labels)
    share = isinstance(amount, float)
    count = min(round(amount * total), LARGEST_VALIDATION) if share else int(amount)
    most = total - len(labels.unique())
    if not 0 < count <= most:
        raise PenjingError(
            f"{name}={amount} splits {count} of {total} training images off for {name}, of which at "
            f"most {most} can be taken (one of each class stays); give a share or a number in that "
            f"range, more images, or a {name} part."
        )
    order = _stratified(labels, count, seed)
    taken, left = order[:count].sort().values, order[count:].sort().values
    parts[name] = (_select(sources, taken), labels[taken])
    parts["train"] = (_select(sources, left), labels[left])
    absent = sorted(set(labels.tolist()) - set(labels[taken].tolist()))
    if absent:
        few = _listed([classes[index] for index in absent])
        say(f"{name}: no images of {few}; there are too few of them to split some off")


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return a random order of the images, int64 ``[N]``, whose first ``count`` are to be split off.

    The first image of each class that has enough comes early and the last of each class late, so that
    it is on both sides; the order of all others is random.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    by_class, sizes = shuffled.argsort(stable=True), shuffled.unique(return_counts=True)[1]
    ends = sizes.cumsum(0)
    first, last = by_class[ends - sizes], by_class[ends - 1]
    place = torch.ones(len(labels), dtype=torch.int64)
    place[first[sizes * count >= len(labels) / 2]] = 0
    place[last] = 2
    return order[place.argsort(stable=True)]


def _select(sources: Sources, indices: Tensor) -> Sources:
    if isinstance(sources, np.ndarray):
        return sources[indices.numpy()]
    return [sources[index] for index in indices.tolist()]


def _image_folder(root: Path) -> tuple[list[str], dict[str, Labelled]]:
    if not root.is_dir():
        raise PenjingError(f"{root}: no such folder; give one with train/CLASS/*.jpg in it.")
    folders = _part_folders(root)
    if "train" not in folders:
        here = _listed([f"{folder.name}/" for folder in _folders(root)]) or "none"
        raise PenjingError(
            f"{root}: has no train/ folder (but {here}); expected train/CLASS/*.jpg."
        )
    classes = [folder.name for folder in _folders(folders["train"])]
    if len(classes) < 2:
        raise PenjingError(
            f"{folders['train']}: has {len(classes)} class folders, at least 2 are needed."
        )
    return classes, {name: _folder_part(folder, classes) for name, folder in folders.items()}


def _part_folders(root: Path) -> dict[str, Path]:
    """Find the folder of each part, and name the other folders to the user."""
    found = {folder.name: folder for folder in _folders(root)}
    parts = {}
    for part, names in PARTS.items():
        present = [name for name in names if name in found]
        if len(present) > 1:
            both = " and ".join(f"{name}/" for name in present)
            raise PenjingError(f"{root}: has both {both}, for one part; keep one of them.")
        if present:
            parts[part] = found.pop(present[0])
    if found and "train" in parts:
        known = ", ".join(f"{name}/" for names in PARTS.values() for name in names)
        others = _listed([f"{name}/" for name in found])
        say(f"{root}: folders that are not read: {others}; those that are: {known}")
    return parts


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _folder_part(folder: Path, classes: list[str]) -> Labelled:
    positions = {name: index for index, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    others = Counter({"in no class folder": sum(not path.is_dir() for path in folder.iterdir())})
    for class_folder in _folders(folder):
        if class_folder.name not in positions:
            raise PenjingError(
                f"{class_folder}: class {class_folder.name!r} is not one of the "
                f"{len(classes)} classes in train/; rename it or add it there."
            )
        found = image_files.listing(class_folder)
        if not found.images:
            unread = f", only {_counted(found.others)}" if found.others else ""
            raise PenjingError(
                f"{class_folder}: class {class_folder.name!r} has no images{unread}; add images "
                "(JPEG, PNG, ...) or remove the folder."
            )
        paths += found.images
        labels += [positions[class_folder.name]] * len(found.images)
        others += found.others
    if not paths:
        raise PenjingError(f"{folder}: has no class folders; expected CLASS/*.jpg in it.")
    if others.total():
        say(f"{folder}: files that are not read: {_counted(others)}")
    _name_dim_images(paths)
    return paths, torch.tensor(labels)


def _counted(files: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in files.most_common() if count)


def _listed(names: Sequence[str]) -> str:
    """Join ``names`` with commas; the first of many and the number of the others."""
    more = len(names) - MANY_CLASSES
    return ", ".join(names[:MANY_CLASSES]) + (f" and {more} more" if more > 0 else "")


def _name_dim_images(paths: Sequence[Path]) -> None:
    sample = paths[:: -(-len(paths) // LOOKED_AT)]
    if all(path.suffix.lower() in DEEP_ENDINGS for path in sample):
        unused = image_files.unused_bits(sample)
        if unused >= 4:
            say(
                f"{sample[0]} and others like it have 16 bits, of which the upper {unused} are 0: they "
                "are read as nearly black; scale them to 16 bits if the camera has fewer"
            )


def _as_first_image(path: Path) -> Preprocessing:
    side = min(*image_files.read(path).size, 224)
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
    # Damaged files raise any error that parsing their headers may raise.
    except Exception as error:
        raise PenjingError(
            f"{root}: torchvision finds no {name} there ({error or type(error).__name__}); "
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
            "expected uint8 [N, H, W, 1 or 3] or [N, H, W]; scale deeper values to 8 bits."
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
