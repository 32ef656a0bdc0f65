"""The README's table of figures, made from ``results/*.json``.

``python benchmarks/figures.py`` rewrites what lies between the ``figures`` markers of README.md;
with ``--check`` it writes nothing and exits with 1 if the table is not the one the results give.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

from results import FOLDER

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
HEAD = (
    "| work | measure | penjing | compared with | goal | met |\n"
    "| :--- | :--- | ---: | :--- | :--- | :--- |\n"
)


def table(folder: Path) -> str:
    """The rows with a goal of all results in ``folder`` as a Markdown table, by name of file."""
    rows = [
        row
        for path in sorted(folder.glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if row["goal"] is not None
    ]
    if not rows:
        return "None yet: each script in `benchmarks/` leaves its own when it is run.\n"
    return HEAD + "".join(_line(row) for row in rows)


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


def _line(row: dict) -> str:
    name = f" ({number(row['peer_name'])})" if row["peer_name"] and row["peer"] is not None else ""
    peer = number(row["peer"]) + name or number(row["peer_name"])
    cells = [row["work"], row["measure"], row["ours"], peer, row["goal"], row["met"]]
    return "| " + " | ".join(number(cell) for cell in cells) + " |\n"


def main() -> int:
    """Rewrite README.md, or say whether it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = updated(before, table(FOLDER))
    if check and after != before:
        print("README.md's figures are stale: run python benchmarks/figures.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
