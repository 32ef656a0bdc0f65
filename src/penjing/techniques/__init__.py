"""One module a technique; dropping a file here is all it takes to add one."""

from __future__ import annotations

import importlib
import pkgutil

from penjing.techniques.technique import Attached, Technique, apply, bake

__all__ = ["Attached", "Technique", "apply", "bake", "techniques"]


def techniques() -> dict[str, type[Technique]]:
    """Return every technique by its name, found by importing the modules of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    kinds = Technique.__subclasses__()
    return {kind.name: kind for kind in kinds if kind.__module__.startswith(f"{__name__}.")}
