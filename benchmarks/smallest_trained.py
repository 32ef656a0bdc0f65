"""The smallest file with training: the entropy penalty on ResNet-20 and VGG-16-BN for CIFAR-10.

    python benchmarks/smallest_trained.py [resnet20_cifar] [vgg16_bn_cifar]

Weights from ../shared/models, recipes from benchmarks/recipes, one result file a net. Trained on
training images, of which some validate; scored once on all test images. Bytes are those of the whole
``.penjing`` file; scores are of the file, unpacked and run by ONNX Runtime. Stages are kept in the
cache folder: stop it, and the same command goes on.
"""

from __future__ import annotations

from pathlib import Path

import results
from frontier import CACHE, named, row
from penjing import recipe
from penjing.devices.local import Local
from smallest import CIFAR, divergence, file_outputs, graph, net, packed_bytes, parameters

NONE = (None, "", None, None)
"""No peer and no goal."""
RECIPES = Path(__file__).parent / "recipes"
GOALS = {
    "resnet20_cifar": (("resnet20_cifar-25x", 25, 0.01),),
    "vgg16_bn_cifar": (("vgg16_bn_cifar-150x", 150, 0.005), ("vgg16_bn_cifar-465x", 465, 0.009)),
}
"""Recipes, how many times smaller than the parameters in float32, and how much less score is allowed."""


def main() -> None:
    for name in named(GOALS):
        results.write(
            f"smallest_trained_{name}", rows(name), f"python benchmarks/smallest_trained.py {name}"
        )


def rows(name: str) -> list[dict]:
    _, model, task, _ = net(name)
    expected, target = file_outputs(model, task, name)
    fp32 = task.score(expected, target)
    original = graph(name).rename(graph(f"{name}-fp32"))
    found = [row(f"{name}, fp32", "top-1, test", fp32, *NONE)]
    for file, times, drop in GOALS[name]:
        steps = recipe.load(RECIPES / f"{file}.yaml")
        small = recipe.compress(model, task, steps, cache=CACHE / "smallest-trained", progress=True)
        outputs, _ = file_outputs(small, task, name)
        size, score = packed_bytes(name), task.score(outputs, target)
        most, least = 4 * parameters(model) / times, CIFAR[name][0] - drop
        before, after = Local().latency([original, graph(name)])
        work = f"{name}, trained, {times}x"
        found += [
            row(work, "file, bytes", size, None, "", int(most), size <= most),
            row(work, "top-1, test", score, None, "", least, score >= least),
            row(work, "divergence from fp32, nats", divergence(outputs, expected), *NONE),
            row(work, "latency, ms", after.median_ms, before.median_ms, "fp32", None, None),
        ]
    return found


if __name__ == "__main__":
    main()
