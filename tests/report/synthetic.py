"""A study as exploration would leave it: ResNet-20 on CIFAR-10, 26 points, figures by formula."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VERSIONS = {"penjing": "0.1.0", "torch": "2.14.1", "onnxruntime": "1.32.0", "numpy": "2.3.4"}
FORMATS = {"float": ("float32", 32), "int8": ("int8", 8), "int4": ("int4", 4), "int2": ("int2", 2)}

# channels removed, weights removed, format, epochs trained
SETTINGS = [
    (channels, sparsity, weights, epochs)
    for epochs, weights in ((0, "int8"), (0, "int4"), (2, "int8"), (2, "int4"), (2, "int2"))
    for channels, sparsity in ((0, 0), (0, 50), (20, 0), (35, 50), (50, 80))
]

RECIPE = [
    {"techniques": [{"prune_channels": {"ratio": 0.35}}], "train": {"epochs": 1.0}},
    {
        "techniques": [
            {"prune_weights": {"sparsity": 0.5}},
            {"quantize": {"weight_bits": 4, "activation_bits": 8}},
        ],
        "train": {"epochs": 1.0},
    },
]


def layers(channels: int, sparsity: int, weights: str) -> list[dict[str, Any]]:
    """ResNet-20's 19 convolutions and its linear layer, with ``channels`` % of channels gone."""
    widths = [max(1, round(width * (1 - channels / 100))) for width in (16, 32, 64)]
    found, inputs, side = [_conv("conv1", 3, widths[0], 32, sparsity, weights)], widths[0], 32
    for stage, outputs in enumerate(widths, start=1):
        side = 32 >> (stage - 1)
        for block in range(3):
            for conv in (1, 2):
                name = f"layer{stage}.{block}.conv{conv}"
                found.append(_conv(name, inputs, outputs, side, sparsity, weights))
                inputs = outputs
    shape = [10, inputs]
    return [*found, _layer("linear", "linear", shape, 10 * inputs, sparsity, weights)]


def _conv(name: str, inputs: int, outputs: int, side: int, sparsity: int, weights: str) -> dict:
    shape = [outputs, inputs, 3, 3]
    return _layer(name, "conv", shape, math.prod(shape) * side**2, sparsity, weights)


def _layer(name: str, kind: str, shape: list, macs: int, sparsity: int, weights: str) -> dict:
    return {
        "name": name,
        "kind": kind,
        "shape": shape,
        "params": math.prod(shape),
        "macs": macs,
        "format": FORMATS[weights][0],
        "sparsity": sparsity / 100,
    }


def point(channels: int, sparsity: int, weights: str, epochs: int, dice: random.Random) -> dict:
    bits = weights.removeprefix("int")
    parts = [f"{channels} % channel pruning", f"{sparsity} % sparse", f"W{bits}A8"]
    parts.append(f"{epochs} epochs")
    wanted = [channels, sparsity, weights != "float", epochs]
    name = " + ".join(part for part, yes in zip(parts, wanted, strict=True) if yes) or "original"
    made = layers(channels, sparsity, weights)
    params, macs = (sum(layer[key] for layer in made) for key in ("params", "macs"))
    bits = FORMATS[weights][1]
    onnx_bytes = round(params * max(bits, 8) / 8 + 24_000)
    packed = round(params * bits / 8 * (1 - sparsity / 125) * 0.88 + 9_000)
    harm = {"float": 0, "int8": 0.1, "int4": 1.6, "int2": 30}[weights]
    harm += 0.004 * channels**2 + 0.0012 * sparsity**2
    harm = harm / (12 if epochs else 1) + (dice.uniform(-0.15, 0.15) if name != "original" else 0)
    score = max(0.1, 0.8844 - harm / 100)
    fp32, latency = 1.12 * dice.uniform(0.98, 1.03), macs / 41e6
    latency = fp32 if weights == "float" else fp32 * latency * 0.42 + 0.05
    return {
        "name": name,
        "recipe": {"name": name, "stages": []},
        "params": params,
        "macs": macs,
        "onnx_bytes": onnx_bytes,
        "packed_bytes": packed,
        "latency_ms": latency,
        "latency_p10_ms": latency * 0.97,
        "latency_p90_ms": latency * dice.uniform(1.04, 1.2),
        "reference_latency_ms": None if name == "original" else fp32,
        "peak_rss_bytes": 41_000_000 + 3 * onnx_bytes,
        "score": score,
        "split": "validation",
        "export_max_error": 0.043,
        "export_top1_agreement": 0.9983,
        "kernels": {"QLinearConv": 19, "QLinearAdd": 9} if weights != "float" else {"Conv": 19},
        "notes": ["4-bit weights of conv1 run dequantized"] if weights == "int4" else [],
        "layers": made,
        "versions": VERSIONS,
        "cpu": "Example CPU @ 2.00GHz, 2 cores",
        "threads": 1,
        "drop": 0.0,
        "test_score": None,
        "test_drop": None,
        "test_drop_low": None,
        "test_drop_high": None,
        "folder": "trials/" + "-".join(re.findall(r"\w+", name)),
        "trained": epochs > 0,
        "contributions": [],
    }


def study() -> dict[str, Any]:
    """The record of ``frontier.json``: baseline, 25 other points, a budget that some meet."""
    dice = random.Random(0)
    baseline = point(0, 0, "float", 0, dice)
    points = [baseline, *(point(*settings, dice) for settings in SETTINGS)]
    for one in points:
        one["drop"] = baseline["score"] - one["score"]
        reach = 0.0 if one is baseline else 0.006
        one |= {"drop_low": one["drop"] - reach, "drop_high": one["drop"] + reach}
        one["divergence"] = max(3 * one["drop"], 0.0)
    names = frontier(points)
    for one in points:
        if one["name"] in names:
            one["test_score"] = one["score"] - 0.004
            one["test_drop"] = baseline["score"] - one["score"]
            one["test_drop_low"], one["test_drop_high"] = one["drop"] - 0.004, one["drop"] + 0.004
    best = next(
        one
        for one in points
        if one["name"] == "35 % channel pruning + 50 % sparse + W4A8 + 2 epochs"
    )
    best["recipe"]["stages"] = RECIPE
    best["contributions"] = _contributions(baseline, best)
    return {
        "version": 1,
        "model": "penjing:resnet20",
        "data": "cifar10",
        "budget": {"size": 80_000.0, "latency": 0.4, "drop": 0.015},
        "elapsed_s": 1815.4,
        "baseline": baseline,
        "points": points,
        "frontier": names,
        "best": best["name"],
        "failures": {"95 % sparse + W1A8": "1-bit weights have no zero to prune to"},
    }


def predictions() -> dict[str, Any]:
    """What the best point makes of 300 images: two got another class, one of them now is wrong."""
    classes = ["cat", "dog", "horse"]
    before = [[95, 5, 0], [6, 94, 0], [0, 1, 99]]
    after = [[94, 6, 0], [5, 95, 0], [0, 1, 99]]
    pictures = [
        {"png": png(0), "true": "cat", "before": "cat", "after": "dog"},
        {"png": png(90), "true": "dog", "before": "cat", "after": "dog"},
    ]
    known = {"changed": 2, "images": 300, "classes": classes, "before": before, "after": after}
    return known | {"pictures": pictures}


def png(grey: int) -> str:
    """A picture of stripes, base64."""
    stripes = np.full((32, 32, 3), grey, dtype=np.uint8)
    stripes[:, ::4] += 120
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def frontier(points: list[dict[str, Any]]) -> list[str]:
    def beats(a: dict, b: dict) -> bool:
        x, y = ((p["packed_bytes"], p["latency_ms"], -p["score"]) for p in (a, b))
        return x != y and all(i <= j for i, j in zip(x, y, strict=True))

    return [p["name"] for p in points if not any(beats(other, p) for other in points)]


def _contributions(baseline: dict[str, Any], best: dict[str, Any]) -> list[dict[str, Any]]:
    measures = ("params", "macs", "packed_bytes", "latency_ms", "score")
    last = {key: best[key] for key in measures}
    first = last | {"packed_bytes": 412_345, "latency_ms": 0.801, "score": 0.8791}
    return [
        {"stage": 1, "techniques": ["prune_channels"], **first},
        {"stage": 2, "techniques": ["prune_weights", "quantize"], **last},
    ]


def write(record: dict[str, Any], folder: Path) -> Path:
    """Leave ``record`` as a study in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in record["points"]:
        (folder / one["folder"]).mkdir(parents=True, exist_ok=True)
    (folder / "frontier.json").write_text(json.dumps(record), encoding="utf-8")
    best = next((one for one in record["points"] if one["name"] == record["best"]), None)
    if best is not None:
        file = folder / best["folder"] / "predictions.json"
        file.write_text(json.dumps(predictions()), encoding="utf-8")
    return folder
