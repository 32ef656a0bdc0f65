"""Output of commands: a table, or one JSON document; and a check that files can be written."""

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
    """Raise PenjingError before the work if its result cannot be written to ``path``."""
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
    """Write the reason why a command failed in one line on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"penjing: {sentence}", markup=False, style="red")


def report(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures by name; the table has only those that are one value."""
    if as_json:
        print_json(figures)
        return
    shown = {k: v for k, v in figures.items() if isinstance(v, str | int | float | None)}
    print_rows(
        (name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
        for name, value in shown.items()
    )


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names with their values, a line each."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def print_table(what: Any) -> None:
    """Print a table, or anything else that rich can render."""
    Console().print(what)


def print_json(data: Any) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(data, indent=1))
