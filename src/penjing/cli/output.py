"""How commands answer: a table, or one JSON document; and whether they can write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from penjing.errors import PenjingError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def writable(path: Path) -> None:
    """Fail before the work, not after it, when its result cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise PenjingError(
            f"cannot write {path}: {error.strerror}; choose another place"
        ) from error


def fail(sentence: str) -> None:
    """Why a command ended, in one line on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"penjing: {sentence}", markup=False, style="red")


def report(figures: dict[str, Any], as_json: bool) -> None:
    """Figures by name; in the table only those that are one value."""
    if as_json:
        print_json(figures)
        return
    shown = {k: v for k, v in figures.items() if isinstance(v, str | int | float | None)}
    print_rows(
        (name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
        for name, value in shown.items()
    )


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Names with what belongs to them, a line each."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def print_table(what: Any) -> None:
    """Show a table, or anything else that rich can render."""
    Console().print(what)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=1))
