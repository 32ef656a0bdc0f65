"""Where a benchmark's figures are written: ``results/NAME.json``, and a table on the terminal.

A row is a dict with the keys ``work`` (what was done), ``measure`` (name and unit), ``ours``,
``peer``, ``peer_name``, ``goal`` (a sentence or number) and ``met`` (True, False, or None where
there is no goal). A benchmark is run as ``python benchmarks/NAME.py``, which puts this module on
the path: ``import results``.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from penjing.devices.local import HERE

FOLDER = Path(__file__).parent / "results"
COLUMNS = ("work", "measure", "ours", "peer", "peer_name", "goal", "met")
PACKAGES = (
    "penjing",
    "constriction",
    "numpy",
    "onnx",
    "onnxruntime",
    "torch",
    "torchvision",
    "nncodec",
)


def write(name: str, rows: list[dict], command: str) -> Path:
    """Write ``rows`` to ``results/<name>.json``, print them, and return the file's path.

    ``command`` is what repeats the benchmark from the repository's root. Raises ValueError for a
    row with a missing or an unknown key.
    """
    for row in rows:
        if set(row) != set(COLUMNS):
            raise ValueError(f"row {row} of {name} must have exactly the keys {COLUMNS}")
    record = {"versions": versions(), "cpu": HERE.name, "command": command, "rows": rows}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(name, rows)
    return path


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that may explain a figure."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _print(name: str, rows: list[dict]) -> None:
    table = Table(*COLUMNS, title=name)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in COLUMNS))
    Console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
