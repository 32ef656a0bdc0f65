"""A bar with a time estimate on the terminal, for work that takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def shown(items: Iterable[Item], what: str, total: int, *, long: bool = True) -> Iterable[Item]:
    """``items``, with a bar on standard error while they are consumed, if that is a terminal.

    ``what`` is being done; ``long`` False shows nothing.
    """
    console = Console(stderr=True)
    hidden = not long or not console.is_terminal
    return track(items, what, total=total, console=console, transient=True, disable=hidden)


def say(line: str) -> None:
    """Print one line on standard error."""
    Console(stderr=True, soft_wrap=True).print(line, markup=False, emoji=False, highlight=False)
