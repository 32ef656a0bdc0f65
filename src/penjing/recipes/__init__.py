"""The recipes that come with penjing: YAML files, each known by its name."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from penjing.errors import PenjingError


def shipped() -> dict[str, Traversable]:
    """The recipe files that come with penjing, by name."""
    files = resources.files(__name__).iterdir()
    found = {Path(file.name).stem: file for file in files if file.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def read(recipe: str | Path) -> str:
    """The YAML of a file, or of the recipe of that name among those that come with penjing.

    Raises:
        PenjingError: there is no such file or name, or the file cannot be read.
    """
    known = shipped()
    try:
        return (known.get(str(recipe)) or Path(recipe)).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PenjingError(
            f"there is no recipe {recipe}: give a YAML file, or one of {', '.join(known)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PenjingError(f"cannot read the recipe {recipe}: {error}") from error
