"""ResNet-20 for CIFAR-10, explored for 30 minutes from its trained weights.

The weights have seen all training images, so validation images are taken from those they have not
seen: every other test image chooses, the rest are the test part that the figures are from.
"""

from __future__ import annotations

from pathlib import Path

import results
from frontier import CACHE, SHARED, need, penjing, row, rows, unpack

PARAMETERS = 269_722


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
    points = {point["name"]: point for point in study["points"]}
    enough = [p for p in map(points.get, study["frontier"]) if smaller(p) >= 8 and faster(p) > 1]
    chosen = max(enough, key=lambda point: point["score"])
    table = judged("least drop at 8 times smaller and faster", chosen)
    if study["best"]:
        table += judged("least bytes times milliseconds", points[study["best"]])
    work = "ResNet-20 on CIFAR-10"
    results.write("resnet20", [*table, *rows(work, study)], "python benchmarks/resnet20.py")


def smaller(point: dict) -> float:
    """Packed bytes against four bytes for each of the original's parameters."""
    return PARAMETERS * 4 / point["packed_bytes"]


def faster(point: dict) -> float:
    """Against the original in the same interleaved run."""
    return point["reference_latency_ms"] / point["latency_ms"] if point["candidate"] else 1.0


def judged(choice: str, point: dict) -> list[dict]:
    """The figures that the claim is about; ``choice`` says how validation chose the point."""
    name, peer = f"{choice}: {point['name']}", "original, fp32"
    size, speed, drop = smaller(point), faster(point), point["test_drop"]
    return [
        row(name, "times smaller, packed", size, 1.0, peer, "at least 8", size >= 8),
        row(name, "times faster", speed, 1.0, peer, "above 1", speed > 1),
        row(name, "test drop", drop, 0.0, peer, "at most 0.01", drop <= 0.01),
    ]


if __name__ == "__main__":
    main()
