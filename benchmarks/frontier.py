"""Run ``penjing`` as a user would and turn a study's frontier into rows for ``results``."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
CACHE = Path(tempfile.gettempdir()) / "penjing-benchmarks"


def need(path: Path) -> Path:
    """``path``, or the end of the script with a sentence that names what is missing."""
    if not path.exists():
        sys.exit(f"{path} is missing: this benchmark needs the data set or weights named there")
    return path


def penjing(*arguments: object) -> dict[str, Any]:
    """Run one command with ``--json`` and its progress on the terminal."""
    command = [sys.executable, "-m", "penjing.cli", *map(str, arguments), "--json"]
    print("$ penjing", *map(str, arguments), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def named(known: Iterable[str]) -> list[str]:
    """The nets ``known`` that the command line names, or all; the end of the script for another."""
    known = list(known)
    for name in sys.argv[1:]:
        if name not in known:
            sys.exit(f"{name} is no net of this benchmark; name {' or '.join(known)}")
    return sys.argv[1:] or known


def unpack(archive: Path, target: Path) -> Path:
    """``archive`` unpacked into ``target`` once."""
    if not target.exists():
        partial = target.with_suffix(".partial")
        with tarfile.open(need(archive)) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(target)
    return target


def rows(work: str, study: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each figure of each point on the frontier, beside the original's."""
    original = study["baseline"]
    points = {point["name"]: point for point in study["points"]}
    table = []
    for name in study["frontier"]:
        point = points[name]
        for measure, ours, peer in (
            ("packed bytes", point["packed_bytes"], original["packed_bytes"]),
            ("latency, ms", point["latency_ms"], point["reference_latency_ms"]),
            ("validation score", point["score"], original["score"]),
            ("test score", point["test_score"], original["test_score"]),
        ):
            table.append(
                row(f"{work}: {name}", measure, ours, peer, "original, fp32, penjing", None, None)
            )
    return table


def row(
    work: str, measure: str, ours: Any, peer: Any, peer_name: str, goal: Any, met: bool | None
) -> dict[str, Any]:
    """A row of a result file."""
    return {
        "work": work,
        "measure": measure,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "goal": goal,
        "met": met,
    }
