"""Tables of figures, made from ``results/*.json``.

``python benchmarks/figures.py`` writes RESULTS.md, every figure with a goal grouped by question, and
the few that stand between the ``figures`` markers of README.md; ``figures.json`` says which question
a result answers, and which figures are in the README. With ``--check`` nothing is written, and the
exit code is 1 if one of the tables is not the one the results give.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from results import FOLDER

ROOT = FOLDER.parent.parent
BLOCK = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
INTRODUCTION = """# Results

Written by `python benchmarks/figures.py` from `benchmarks/results/`, which names the versions of all
packages. A figure without a goal is in its result file only.
"""
HEAD = (
    "| work | measure | penjing | compared with | goal | met |\n"
    "| :--- | :--- | ---: | :--- | :--- | :--- |\n"
)
SHORT_HEAD = "| what was measured | penjing | compared with |\n| :--- | ---: | :--- |\n"
OTHER = "Other figures"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in ``folder`` by name."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def page(results: dict[str, dict[str, Any]], questions: dict[str, list[str]]) -> str:
    """RESULTS.md: a section for each question, then what answers none of them."""
    known = {name for names in questions.values() for name in names}
    groups = questions | {OTHER: [name for name in results if name not in known]}
    sections = [
        _section(question, [results[name] for name in names if name in results])
        for question, names in groups.items()
    ]
    return INTRODUCTION + "".join(sections)


def _section(question: str, results: list[dict[str, Any]]) -> str:
    rows = [row for result in results for row in result["rows"] if row["goal"] is not None]
    if not rows:
        return ""
    made = ", ".join(f"`{result['command']}` on {result['cpu']}" for result in results)
    return f"\n## {question}\n\n{made}.\n\n{HEAD}" + "".join(map(_line, rows))


def highlights(results: dict[str, dict[str, Any]], chosen: list[list[str]]) -> str:
    """The README's table: ``chosen`` names a text, a result, and the work and measure of a row.

    Raises ValueError for a row that is not there.
    """
    lines = []
    for text, name, work, measure in chosen:
        rows = results.get(name, {"rows": []})["rows"]
        found = [row for row in rows if (row["work"], row["measure"]) == (work, measure)]
        if not found:
            raise ValueError(f"results/{name}.json has no row {work!r}, {measure!r}")
        lines.append(f"| {text} | {number(found[0]['ours'])} | {_peer(found[0])} |\n")
    return SHORT_HEAD + "".join(lines)


def updated(readme: str, block: str) -> str:
    """``readme`` with ``block`` between its markers. Raises ValueError if it has none."""
    if not BLOCK.search(readme):
        raise ValueError("README.md has no lines <!-- figures --> and <!-- /figures -->")
    return BLOCK.sub(lambda _: block, readme)


def number(value: object) -> str:
    """Four significant digits, never with an exponent; text and whole numbers as they are."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return " ".join(str(value).split()).replace("|", "\\|")
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _line(row: dict[str, Any]) -> str:
    cells = [row["work"], row["measure"], row["ours"], row["goal"], row["met"]]
    work, measure, ours, goal, met = map(number, cells)
    return f"| {work} | {measure} | {ours} | {_peer(row)} | {goal} | {met} |\n"


def _peer(row: dict[str, Any]) -> str:
    name = number(row["peer_name"])
    if row["peer"] is None or not name:
        return number(row["peer"]) or name
    return f"{number(row['peer'])} ({name})"


def main() -> int:
    """Rewrite both files, or say which is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    results = read(FOLDER)
    layout = json.loads((FOLDER.parent / "figures.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = {
        ROOT / "README.md": updated(readme, highlights(results, layout["highlights"])),
        FOLDER.parent / "RESULTS.md": page(results, layout["questions"]),
    }
    stale = [p for p, text in made.items() if not p.exists() or p.read_text("utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.name} is stale: run python benchmarks/figures.py", file=sys.stderr)
        else:
            path.write_text(made[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
