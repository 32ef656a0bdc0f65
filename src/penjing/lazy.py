"""Packages whose names are imported when they are first used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attributes(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of ``package``.

    ``home`` gives for each name its module within the package, as ``models:load`` where it has another
    name there.
    """

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = home[name].partition(":")
        return getattr(import_module(f"{package}.{module}"), attribute or name)

    return find
