"""Settings that may differ by layer: ``weight_bits: 4``, or ``weight_bits: {"layer4.*": 4, "*": 8}``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Discriminator, Tag

from penjing.errors import PenjingError

T = TypeVar("T")


def _form(value: Any) -> str:
    return "" if isinstance(value, dict) else " "


def _pattern(key: Any) -> Any:
    if type(key) is int:  # YAML reads 3 so, which is a layer of an nn.Sequential
        return str(key)
    if not isinstance(key, str):  # 1.10 has become 1.1
        raise ValueError(f"patterns of names must be text, found {key!r}; put it in quotes")
    return key


# The tags are blank, so that errors name the setting and the pattern only.
ByLayer = Annotated[
    Annotated[T, Tag(" ")]
    | Annotated[dict[Annotated[str, BeforeValidator(_pattern)], T | None], Tag("")],
    Discriminator(_form),
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
