"""Progress of long work on standard error: a bar on a terminal, else a line a minute.

All bars and lines go through one console, so that a bar within another is drawn below it, and lines
above both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

CONSOLE = Console(stderr=True)
LINE_EVERY_S = 60.0


def say(line: str) -> None:
    """Print one line on standard error, above a bar if there is one."""
    CONSOLE.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Bar:
    """Progress of a piece of work; this class shows nothing."""

    def update(self, share: float, what: str | None = None) -> None:
        """Show that ``share`` (in [0, 1]) is done; ``what`` renames the work."""


@contextmanager
def bar(what: str, *, hidden: bool = False) -> Iterator[Bar]:
    """Show the progress of ``what`` until the block ends; ``hidden`` shows nothing."""
    if hidden:
        yield Bar()
    elif CONSOLE.is_terminal:
        with _columns() as progress:
            yield _Drawn(progress, what)
    else:
        yield _Lines(what)


def shown(items: Iterable[Item], what: str, total: int, *, long: bool = True) -> Iterator[Item]:
    """Yield ``items``, ``total`` in number, and show the progress of ``what`` that is done with them;
    ``long`` False shows nothing."""
    with bar(what, hidden=not long) as line:
        for done, item in enumerate(items):
            line.update(done / max(total, 1))
            yield item


class _Lines(Bar):
    """Lines in a log: at most one a minute, however many bars there are."""

    last_s = -math.inf

    def __init__(self, what: str) -> None:
        self.what, self.start_s = what, monotonic()
        self.first: tuple[float, float] | None = None

    def update(self, share: float, what: str | None = None) -> None:
        self.what = what or self.what
        now = monotonic()
        # A resumed work does not begin at 0: what is left goes by what this process has done.
        first_share, first_s = self.first = self.first or (share, now)
        if now - max(self.start_s, _Lines.last_s) < LINE_EVERY_S:
            return
        _Lines.last_s = now
        done = share - first_share
        left = (now - first_s) * (1 - share) / done if done > 0 else None
        say(f"{self.what}: {share:.0%}" + (f", {_duration(left)} left" if left else ""))


class _Drawn(Bar):
    """A bar on a terminal."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.task = progress, progress.add_task(what, total=1.0)

    def update(self, share: float, what: str | None = None) -> None:
        self.progress.update(self.task, completed=share, description=what)


def _columns() -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), TaskProgressColumn(), TimeLeft())
    return Progress(*columns, console=CONSOLE, transient=True)


def _duration(seconds: float) -> str:
    """Write ``seconds`` in the largest unit of which there are two."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
