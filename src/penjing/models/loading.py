"""Load a model by a short name: from torchvision, timm, the reference nets, or the user's file."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torchvision
from torch import nn

from penjing.errors import PenjingError
from penjing.models.reference import REFERENCE, Reference
from penjing.models.weights import load_weights, stored_preprocessing
from penjing.models.wrappers import unwrapped
from penjing.tasks.preprocessing import Preprocessing

FORMS = "torchvision:NAME, timm:NAME, penjing:NAME or FILE.py:FACTORY"

# Heads that only help training, with the prefixes of their tensors in torchvision's weights.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def load(
    spec: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Load the model that ``spec`` names, in evaluation mode, without ``DataParallel`` or
    ``torch.compile`` around it. Nothing is downloaded.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``penjing:NAME`` or ``FILE.py:FACTORY`` (the file
            is run, the function called with those of ``num_classes`` and ``channels`` it takes).
        weights: state dict or training checkpoint, see ``load_weights``; None leaves random
            weights.
        num_classes: width of the output; None is the net's own.
        channels: channels of the input image; None is the net's own.
        new_head: take weights for another number of classes too, all but the last layer, which is
            then to be trained; needs ``num_classes``.

    Raises:
        PenjingError: an unknown name, a file that does not give a model, weights that do not fit.
    """
    kind, name = _parse(spec)
    options = {"num_classes": num_classes, "channels": channels}
    given = {option: value for option, value in options.items() if value is not None}
    model = unwrapped(SOURCES[kind].model(name, **given))
    if weights is not None:
        load_weights(
            model,
            weights,
            optional=AUXILIARY.get(name, ()),
            new_classes=num_classes if new_head else None,
        )
    return model.eval()


def preprocessing(
    spec: str, *, weights: str | Path | None = None, channels: int | None = None
) -> Preprocessing | None:
    """Return the preprocessing that the model named by ``spec`` expects; None if it is unknown.

    It comes from the file ``weights``, if ``penjing train`` wrote it; or else from torchvision's
    default weights, timm's configuration, the reference net, or, in the user's file, a
    ``Preprocessing`` called ``preprocessing``. With ``channels``, mean and standard deviation are
    averaged over, or repeated for, the channels.

    Raises:
        PenjingError: an unknown name, a damaged file of weights.
    """
    kind, name = _parse(spec)
    found = (weights and stored_preprocessing(weights)) or SOURCES[kind].preprocessing(name)
    if found is None or channels in (None, found.channels):
        return found
    mean, std = (sum(values) / len(values) for values in (found.mean, found.std))
    changes = {"channels": channels, "mean": (mean,) * channels, "std": (std,) * channels}
    return found.model_copy(update=changes)


def _parse(spec: str) -> tuple[str, str]:
    kind, _, name = spec.partition(":")
    if kind in SOURCES and name:
        return kind, name
    file, _, factory = spec.rpartition(":")
    if file.endswith(".py") and factory:
        return FILE, spec
    raise PenjingError(f"{spec}: not a model; expected {FORMS}.")


def _unknown(kind: str, name: str, known: Iterable[str]) -> PenjingError:
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known[:20])}."
    return PenjingError(f"{kind}:{name} is not known; {hint}")


def _from_torchvision(name: str, channels: int = 3, **options: int) -> nn.Module:
    _check_torchvision(name)
    if name in AUXILIARY:
        # The published weights of both want inputs in [-1, 1], and convert them inside the net.
        ported = {"aux_logits": False, "init_weights": True, "transform_input": channels == 3}
        model = torchvision.models.get_model(name, weights=None, **options, **ported)
    else:
        model = torchvision.models.get_model(name, weights=None, **options)
    if channels != 3:
        _set_input_channels(model, channels)
    return model


def _check_torchvision(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown("torchvision", name, known)


def _set_input_channels(model: nn.Module, channels: int) -> None:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = channels
    first.weight = nn.Parameter(torch.empty(first.out_channels, channels, *first.kernel_size))
    first.reset_parameters()


def _torchvision_preprocessing(name: str) -> Preprocessing | None:
    _check_torchvision(name)
    default = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    if default is None:
        return None
    preset = default.transforms()
    return Preprocessing(
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise PenjingError(f"timm:{name} needs timm; pip install penjing[timm].") from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm


def _from_timm(name: str, channels: int = 3, **options: int) -> nn.Module:
    return _timm(name).create_model(name, pretrained=False, in_chans=channels, **options)


def _timm_preprocessing(name: str) -> Preprocessing | None:
    config = _timm(name).get_pretrained_cfg(name)
    if config is None:
        return None
    size = tuple(config.input_size[-2:])
    # Squashing distorts the image to the input's shape instead of cropping it.
    squash = config.crop_mode == "squash"
    # More than 1 (volo) would pad the image with black: it fills the input instead.
    share = min(config.crop_pct, 1.0)
    return Preprocessing(
        size=size,
        channels=config.input_size[0],
        resize=None if squash else math.floor(min(size) / share),
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


def _reference(name: str) -> Reference:
    if name not in REFERENCE:
        raise _unknown("penjing", name, REFERENCE)
    return REFERENCE[name]


def _reference_preprocessing(name: str) -> Preprocessing:
    return _reference(name).preprocessing


def _from_reference(name: str, **options: int) -> nn.Module:
    factory = _reference(name).factory
    unsupported = options.keys() - _accepted(factory, options).keys()
    if unsupported:
        raise PenjingError(f"penjing:{name} has no {', '.join(unsupported)}; leave it out.")
    return factory(**options)


def _from_file(spec: str, **options: int) -> nn.Module:
    file, _, name = spec.rpartition(":")
    factory = getattr(_run_file(Path(file)), name, None)
    if not callable(factory):
        raise PenjingError(f"{file}: has no function {name}; name one that returns the model.")
    try:
        model = factory(**_accepted(factory, options))
    except Exception as error:
        raise PenjingError(f"{spec}: failed with {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise PenjingError(f"{spec}: returned {type(model).__name__}, expected an nn.Module.")
    return model


def _accepted(factory: Callable, options: dict[str, int]) -> dict[str, int]:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return options
    return {option: value for option, value in options.items() if option in parameters}


def _file_preprocessing(spec: str) -> Preprocessing | None:
    file = spec.rpartition(":")[0]
    found = getattr(_run_file(Path(file)), "preprocessing", None)
    return found if isinstance(found, Preprocessing) else None


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PenjingError(f"{path}: no such file.")
    name = f"penjing_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As when Python runs the file: it can import its neighbours, and itself by its name.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PenjingError(f"{path}: failed with {type(error).__name__}: {error}.") from error
    return module


class Source(NamedTuple):
    """Functions that load the models of one prefix and their preprocessing."""

    model: Callable[..., nn.Module]
    """Called with ``(name, num_classes=, channels=)``, the options only if given."""
    preprocessing: Callable[[str], Preprocessing | None]


FILE = "file"
SOURCES = {
    "torchvision": Source(_from_torchvision, _torchvision_preprocessing),
    "timm": Source(_from_timm, _timm_preprocessing),
    "penjing": Source(_from_reference, _reference_preprocessing),
    FILE: Source(_from_file, _file_preprocessing),
}
