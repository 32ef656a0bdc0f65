"""The README's picture: the frontier that a search found for ResNet-20 on CIFAR-10.

``python benchmarks/picture.py`` reads ``results/resnet20.json`` and writes ``docs/frontier.png`` with a
headless Chromium (``apt-get install chromium``).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from results import FOLDER

TARGET = FOLDER.parent.parent / "docs" / "frontier.png"
WORK = "ResNet-20 on CIFAR-10: "
WIDTH, HEIGHT = 1000, 420
BLUE, BLACK = "#0072b2", "#1f2328"
LOWEST = 0.8
PLACES = {  # Of a label beside its point.
    "original": "top center",
    "W16": "top center",
    "W4A8": "middle right",
    "50 % sparse + W4A8 + 0.192 epochs": "middle left",
    "W2A8 + 0.064 epochs": "bottom center",
    "50 % sparse + W4A8 + 0.064 epochs": "middle right",
}


def points() -> dict[str, dict[str, tuple[float, float]]]:
    """The figures of the original and of each point on the frontier, by name and measure, each beside
    the original's."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    record = json.loads((FOLDER / "resnet20.json").read_text(encoding="utf-8"))
    for row in record["rows"]:
        if row["work"].startswith(WORK):
            measures = found.setdefault(row["work"].removeprefix(WORK), {})
            measures[row["measure"]] = row["ours"], row["peer"]
    original = {measure: (peer, peer) for measure, (_, peer) in found["W4A8"].items()}
    return {"original": original} | found


def label(name: str, point: dict[str, tuple[float, float]]) -> str:
    """What is written beside a point: its name, and how much smaller and faster it is."""
    size, before = point["packed bytes"]
    latency, reference = point["latency, ms"]
    if name == "original":
        return "<b>original, fp32</b>"
    speed = f"{reference / latency:.1f}× faster" if reference / latency > 1.05 else "as fast"
    return f"<b>{name}</b><br>{before / size:.1f}× smaller, {speed}"


def figure() -> go.Figure:
    """Test accuracy against the size of the packed file."""
    known = {n: p for n, p in points().items() if p["test score"][0] > LOWEST}
    ordered = sorted(known.items(), key=lambda entry: entry[1]["packed bytes"][0])
    sizes = [point["packed bytes"][0] / 1e3 for _, point in ordered]
    scores = [100 * point["test score"][0] for _, point in ordered]
    plot = go.Figure(
        go.Scatter(
            x=sizes,
            y=scores,
            mode="markers+text",
            marker={
                "size": 12,
                "color": [BLACK if name == "original" else BLUE for name, _ in ordered],
                "symbol": ["square" if name == "original" else "circle" for name, _ in ordered],
            },
            text=[label(*entry) for entry in ordered],
            textposition=[PLACES.get(name, "middle right") for name, _ in ordered],
            textfont={"size": 13},
        )
    )
    ticks = [40, 60, 100, 200, 400, 900]
    plot.update_layout(template="simple_white", width=WIDTH, height=HEIGHT, font_size=14)
    plot.update_layout(margin={"l": 70, "r": 30, "t": 20, "b": 60}, font_color=BLACK)
    grid = {"showgrid": True, "gridcolor": "#eaeef2"}
    plot.update_xaxes(title="packed file, KB (log scale)", type="log", tickvals=ticks, **grid)
    plot.update_xaxes(range=[1.52, 3.08], ticktext=[f"{tick}" for tick in ticks])
    plot.update_yaxes(title="top-1 on test images, %", range=[82, 89.5], **grid)
    return plot


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "picture.html"
        figure().write_html(page, config={"displayModeBar": False})
        text = page.read_text("utf-8").replace("<body>", '<body style="margin:0">', 1)
        page.write_text(text, "utf-8")
        size = f"--window-size={WIDTH},{HEIGHT}"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        scale = "--force-device-scale-factor=1.5"
        command = ["chromium", *options, scale, size, f"--screenshot={TARGET}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
