"""LeNet-5 on MNIST: trained, then explored for 20 minutes, against Deep Compression's figures.

The point that is judged is the study's best: chosen on validation images, its error read on test.
"""

from __future__ import annotations

import results
from frontier import CACHE, SHARED, need, penjing, row, rows

DEEP_COMPRESSION = "Deep Compression (Han et al. 2016), LeNet-5"


def main() -> None:
    data = ("--data", "torchvision:MNIST", "--root", need(SHARED / "data" / "mnist"))
    weights = CACHE / "lenet5.safetensors"
    trained = penjing("train", "penjing:lenet5", *data, "--epochs", 20, "-o", weights)
    budget = ("--max-size", "44KB", "--max-drop", "0.2%", "--time", "20m")
    study = penjing(
        "explore", "penjing:lenet5", "--weights", weights, *data, *budget, "-o", CACHE / "lenet5"
    )
    best = next(p for p in study["points"] if p["name"] == study["best"])
    error, trained_error = 1 - best["test_score"], 1 - trained["test_score"]
    results.write(
        "lenet5",
        [
            row("train LeNet-5 on MNIST", "test error", trained_error, None, "", 0.009,
                trained_error <= 0.009),
            row(f"best: {best['name']}", "packed bytes", best["packed_bytes"], 44_000,
                DEEP_COMPRESSION, 44_000, best["packed_bytes"] < 44_000),
            row(f"best: {best['name']}", "test error", error, 0.0074, DEEP_COMPRESSION, 0.008,
                error <= 0.008),
            *rows("LeNet-5 on MNIST", study),
        ],
        "python benchmarks/lenet5.py",
    )  # fmt: skip


if __name__ == "__main__":
    main()
