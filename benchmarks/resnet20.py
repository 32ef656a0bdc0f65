"""ResNet-20 for CIFAR-10, explored for 30 minutes from its trained weights.

The weights have seen all training images, so validation images are taken from those they have not
seen: every other test image chooses, the rest are the test part that the figures are from.
"""

from __future__ import annotations

from pathlib import Path

import results
from frontier import CACHE, SHARED, need, penjing, row, rows, unpack


def folders() -> Path:
    """CIFAR-10 as train/, val/ and test/, the last two from the original test part."""
    root = CACHE / "cifar10"
    archives = SHARED / "data" / "cifar10"
    train = unpack(archives / "train.tar", CACHE / "cifar10-train")
    test = unpack(archives / "test.tar", CACHE / "cifar10-test")
    if not root.exists():
        partial = root.with_suffix(".partial")
        partial.mkdir()
        (partial / "train").symlink_to(train / "train")
        for file in sorted((test / "test").rglob("*.jpg")):
            part = "val" if int(file.stem) % 2 else "test"
            (partial / part / file.parent.name).mkdir(parents=True, exist_ok=True)
            (partial / part / file.parent.name / file.name).symlink_to(file)
        partial.rename(root)
    return root


def main() -> None:
    weights = need(SHARED / "models" / "resnet20_cifar.safetensors")
    command = ("explore", "penjing:resnet20_cifar", "--weights", weights, "--data", folders())
    study = penjing(*command, "--max-drop", "1%", "--time", "30m", "-o", CACHE / "resnet20")
    original = study["baseline"]
    best = next(p for p in study["points"] if p["name"] == study["best"])
    smaller = original["params"] * 4 / best["packed_bytes"]
    faster = best["reference_latency_ms"] / best["latency_ms"]
    name, peer = f"best: {best['name']}", "original, fp32, penjing"
    results.write(
        "resnet20",
        [
            row(name, "times smaller (packed, against fp32 weights)", smaller, 1.0, peer, 8.0,
                smaller >= 8),
            row(name, "times faster", faster, 1.0, peer, 1.0, faster > 1),
            row(name, "test drop", best["test_drop"], 0.0, peer, 0.01, best["test_drop"] <= 0.01),
            *rows("ResNet-20 on CIFAR-10", study),
        ],
        "python benchmarks/resnet20.py",
    )  # fmt: skip


if __name__ == "__main__":
    main()
