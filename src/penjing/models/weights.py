"""Weights from a file into a model, without ever unpickling."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from penjing.errors import PenjingError


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the state dict in ``path`` (.safetensors, .pt or .pth) into ``model``, in place.

    A state dict under "state_dict" or "model", and names that all begin with "module.", are
    accepted. Values are cast to the model's types.

    Raises:
        PenjingError: an unreadable or refused file, or tensors that do not fit the model.
    """
    path = Path(path)
    insert_state(model, read_state(path), path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a weights file by name."""
    if not path.is_file():
        raise PenjingError(f"{path}: no such weights file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise PenjingError(f"{path}: not a readable safetensors file ({error}).") from error
    if path.suffix in (".pt", ".pth"):
        return _state_dict(_tensors_only(path), path)
    raise PenjingError(
        f"{path}: weights must be .safetensors, or a state dict in .pt or .pth; other files "
        "are not opened, because opening them may run code that is hidden in them."
    )


def insert_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy ``state`` into ``model``; ``source`` is named in the error when it does not fit."""
    expected = model.state_dict()
    # Written by PyTorch since 1.0 only, and of no effect on the output.
    expected = {k: v for k, v in expected.items() if k in state or "num_batches_tracked" not in k}
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [k for k, v in expected.items() if k in state and v.shape != state[k].shape]
    if missing or unexpected or reshaped:
        key = (reshaped + missing + unexpected)[0]
        raise PenjingError(
            f"{source}: does not fit the model: {key!r} should be {_shape(expected, key)} and is "
            f"{_shape(state, key)} ({len(missing)} of {len(expected)} tensors missing, "
            f"{len(unexpected)} unexpected, {len(reshaped)} of another shape); "
            "check the model's name and num_classes."
        )
    model.load_state_dict(state, strict=False)


def _tensors_only(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PenjingError(
            f"{path}: holds Python objects beside tensors and is not opened, because that may run "
            "code hidden in it; save model.state_dict() instead."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise PenjingError(f"{path}: cannot be read as PyTorch weights ({error}).") from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise PenjingError(
            f"{path}: holds a {type(content).__name__}, expected a state dict of named tensors."
        )
    strange = next((k for k, v in content.items() if not isinstance(v, Tensor)), None)
    if strange is not None:
        raise PenjingError(
            f"{path}: {strange!r} is a {type(content[strange]).__name__}, expected a tensor; "
            "save model.state_dict() alone, or under 'state_dict'."
        )
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _shape(state: dict[str, Tensor], key: str) -> str:
    return str(list(state[key].shape)) if key in state else "absent"
