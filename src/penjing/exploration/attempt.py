"""Attempts of candidates: each ends as a point or as a failure with a reason.

An attempt leaves a mark in its folder while it runs. When the process ends in the middle, the next one
finds the mark, and decides by the files beside it whether the candidate was to blame: a trace of a
fatal signal, or a count of processes that the system killed for lack of memory.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from penjing import files
from penjing.errors import PenjingError

STARTED, CRASH, ERROR, FAILURE = "started.json", "crash.txt", "error.txt", "failure.json"
MOST_CRASHES = 2
MOST_ENDS = 5
"""Number of attempts killed for unknown reasons after which a candidate is given up: most likely the
user or the machine ended them, so that the candidate is not to blame."""


class TooLongError(BaseException):
    """An attempt took longer than allowed. No ``Exception``, since libraries catch those."""


@contextmanager
def attempt(folder: Path, seconds: float | None) -> Iterator[None]:
    """Mark ``folder`` while the block runs, and let it take at most ``seconds``.

    Raises:
        TooLongError: the block took longer. It is stopped only in the main thread of a POSIX system.
        PenjingError: the mark cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = _read(folder / STARTED) or {"ends": 0, "crashes": 0}
    known = {key: mark.get(key, 0) for key in ("ends", "crashes")}
    files.write_text(folder / STARTED, json.dumps(known | {"boot": _boot(), "killed": _killed()}))
    try:
        with _traced(folder / CRASH), _limited(seconds):
            yield
    except SystemExit as error:
        # The candidate has ended the process by itself: the mark stays.
        _note(folder / CRASH, f"SystemExit: {error.code}")
        raise
    except BaseException:
        _unmark(folder)
        raise
    _unmark(folder)


def blamed(folder: Path) -> str | None:
    """Return why the candidate of ``folder`` is not tried again, because the process ended too often
    while it ran; None if it may be. An end that is found for the first time is counted."""
    mark = _read(folder / STARTED)
    if mark is None:
        return None
    crash = _text(folder / CRASH)
    same = mark.get("boot") == _boot() and mark.get("killed") is not None
    starved = same and (_killed() or 0) > mark["killed"]
    if "killed" in mark:
        ends, crashes = mark.get("ends", 0) + 1, mark.get("crashes", 0) + bool(crash)
        files.write_text(folder / STARTED, json.dumps({"ends": ends, "crashes": crashes}))
    else:
        ends, crashes = mark.get("ends", 0), mark.get("crashes", 0)
    if not (starved or crashes >= MOST_CRASHES or ends >= MOST_ENDS):
        return None
    why = "memory ran out" if starved else crash or "it was killed"
    return f"the process ended while it ran, {ends} time{'s' if ends > 1 else ''} ({why})"


def reason_of(error: BaseException) -> str:
    """Return one line: the sentence of a PenjingError, or type and first line of ``error``."""
    said = str(error).strip().splitlines()
    first = said[0].strip() if said else ""
    if isinstance(error, PenjingError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def fail(folder: Path, name: str, reason: str, error: BaseException | None = None) -> None:
    """Write to ``folder`` why the candidate ``name`` failed, and the traceback of ``error``."""
    if error is not None:
        files.write_text(folder / ERROR, "".join(traceback.format_exception(error)))
    files.write_text(folder / FAILURE, json.dumps({"name": name, "reason": reason}))
    _unmark(folder)


def failures(trials: Path) -> dict[str, str]:
    """Read the reasons of all candidates that failed, by name; unreadable ones are left out."""
    found = {}
    for file in sorted(trials.glob(f"*/{FAILURE}"), key=_written):
        record = _read(file)
        if record is not None and isinstance(record.get("reason"), str):
            found[record.get("name", file.parent.name)] = record["reason"]
    return found


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"it took longer than {seconds:,.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second, for code that catches everything.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _traced(path: Path) -> Iterator[None]:
    """Write a trace to ``path`` if the process dies of a signal such as a segmentation fault, unless
    the user writes traces elsewhere."""
    if faulthandler.is_enabled():
        yield
        return
    with path.open("w") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()


def _killed() -> int | None:
    """Count the processes that the system killed for lack of memory since its start; None if unknown."""
    for file in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        for line in _text(file, whole=True).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdigit():
                return int(count)
    return None


def _boot() -> str:
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def _text(path: Path, *, whole: bool = False) -> str:
    """Read the first line of ``path``, or the whole file; empty if it cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return text if whole else text.strip().partition("\n")[0]


def _note(path: Path, line: str) -> None:
    try:
        path.write_text(line + "\n")
    except OSError:
        return  # A full disk must not hide the error that is being raised.


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unmark(folder: Path) -> None:
    for name in (STARTED, CRASH):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError:
            return
