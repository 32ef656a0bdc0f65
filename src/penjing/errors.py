"""The exception whose message is for users."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class PenjingError(Exception):
    """An error that the user can put right.

    The message is one sentence that names the layer, file or option, what was expected, what was
    found, and what to do. The command line prints it on standard error and exits with code 2.
    """


def invalid(error: ValidationError) -> tuple[str, str]:
    """Return the dotted name of the first invalid setting, and what is wrong with it."""
    first = error.errors()[0]
    # Blank parts stand for the two forms of a setting by layer.
    place, reason = ".".join(str(part) for part in first["loc"] if str(part).strip()), first["msg"]
    if first["type"] == "extra_forbidden":
        return place, "there is no such setting"
    if first["type"] == "missing":
        return place, "is missing"
    if first["type"] == "value_error":  # One of our own validators, in our own words.
        return place, reason.removeprefix("Value error, ")
    expected = reason.replace("Input should", "must").partition(", unable to")[0]
    return place, f"{expected}, found {first['input']!r}"
