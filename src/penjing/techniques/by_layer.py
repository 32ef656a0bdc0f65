"""Settings that may differ by layer: ``weight_bits: 4``, or ``weight_bits: {"layer4.*": 4, "*": 8}``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Tag

from penjing.errors import PenjingError

T = TypeVar("T")


def _form(value: Any) -> str:
    return "" if isinstance(value, dict) else " "


# The tags are blank, so that errors name the setting and the pattern only.
ByLayer = Annotated[
    Annotated[T, Tag(" ")] | Annotated[dict[str, T | None], Tag("")], Discriminator(_form)
]
"""One value for all layers, or values by patterns of their names (as in ``fnmatch``), of which the first
that fits a layer counts. None leaves a layer alone; a layer that no pattern fits has the setting's
default. Names are those that layers have when the technique is attached."""


def values(setting: Any) -> list[Any]:
    """Return the values that a ``ByLayer`` gives to any layer."""
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def for_each(setting: Any, names: Iterable[str], default: Any, called: str) -> dict[str, Any]:
    """Return the value of a ``ByLayer`` for each of the layers ``names``.

    Raises ``PenjingError``, in which the setting is ``called`` so, for a pattern that fits no layer.
    """
    names = list(names)
    if not isinstance(setting, dict):
        return dict.fromkeys(names, setting)
    for pattern in setting:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PenjingError(
                f"{called} is given for {pattern!r}, which none of its layers is called; "
                f"they are {', '.join(names)}."
            )

    def value(name: str) -> Any:
        fitting = (one for pattern, one in setting.items() if fnmatchcase(name, pattern))
        return next(fitting, default)

    return {name: value(name) for name in names}
