"""End commands with one line on standard error and an exit code.

The exit code is 0 for success, 1 for a fault of penjing's, 2 for an error that the user can put right,
130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from penjing.cli.output import fail
from penjing.errors import PenjingError
from penjing.files import disk_is_full

FAULT, WRONG, STOPPED = 1, 2, 130
DEBUG = "PENJING_DEBUG"
"""Environment variable that shows the traceback of a fault if it is 1."""


class StoppedError(Exception):
    """Ctrl-C ended a command that resumes when it is given again."""


def resumable(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``command`` to say, when Ctrl-C ends it, that it resumes if given again."""

    @functools.wraps(command)
    def run(**options: object) -> None:
        try:
            command(**options)
        except KeyboardInterrupt as stop:
            raise StoppedError from stop

    return run


def run(app: Callable[[], object]) -> None:
    """Call ``app`` and end the process with its exit code."""
    try:
        code = _run(app)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has ended, as in `penjing profile ... | head`; Python would report it at exit, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAULT
    sys.exit(code)


def _run(app: Callable[[], object]) -> int | str | None:
    try:
        app()
    except SystemExit as end:  # typer always ends so, with 130 after Ctrl-C
        if end.code == STOPPED:
            fail("stopped")
        return end.code
    except StoppedError:
        fail("stopped; the same command resumes")
        return STOPPED
    except KeyboardInterrupt:
        fail("stopped")
        return STOPPED
    except BrokenPipeError:
        raise
    except Exception as error:
        return _told(error)
    return 0


def _told(error: Exception) -> int:
    """Write ``error`` in one line, and return its exit code."""
    if disk_is_full(error):
        files = [getattr(cause, "filename", None) for cause in _causes(error)]
        place = next((f" ({file})" for file in files if file), "")
        fail(f"the disk is full{place}: make room, or write elsewhere, and give the command again")
        return WRONG
    if isinstance(error, PenjingError):
        fail(str(error))
        return WRONG
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    text = " ".join(str(error).split())
    fail(
        f"unexpected {type(error).__name__}: {text[:400]}; this is a fault of penjing's: please report "
        f"it on the project's issue page, with what penjing --debug shows for the same command"
    )
    return FAULT


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
