"""Save a compressed model, and load it into a fresh instance of the original.

A snapshot is a folder with ``model.safetensors`` (all tensors) and ``structure.json``: type, sizes and
state of each layer of a kind that techniques change. Everything else a model does is its own code,
which a snapshot does not hold: nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing import files
from penjing.errors import PenjingError
from penjing.net import input_quantizer, layers
from penjing.net.input_quantizer import InputQuantizer

VERSION = 1
TENSORS, STRUCTURE = "model.safetensors", "structure.json"

_CONVOLUTION = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
_CONVOLUTION += ["groups", "padding_mode"]
_NORM = ["num_features", "eps", "momentum", "affine", "track_running_stats"]
SIZES: dict[type[nn.Module], list[str]] = {
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Linear: ["in_features", "out_features"],
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.PReLU: ["num_parameters"],
    nn.Sequential: [],
    nn.Identity: [],
}
"""Attributes that hold a layer's sizes, by type; constructor arguments have the same names."""
_KINDS = {kind.__name__: kind for kind in SIZES}


def save(model: nn.Module, folder: Path) -> None:
    """Write ``model`` to ``folder``, atomically, replacing what is there.

    Raises:
        PenjingError: a technique is still attached to a layer, or the disk is full.
    """
    structure: dict[str, dict[str, Any]] = {}
    tensors = dict(model.state_dict())
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            raise PenjingError(f"Layer {name} has a technique attached; bake it before saving.")
        if id(module) in seen:
            structure[name] = {"same_as": seen[id(module)]}
        elif name and _kind(module) is not None:
            structure[name] = _description(module)
            _add_format(name, module, structure[name], tensors)
        seen.setdefault(id(module), name)
    with files.atomic(folder) as partial:
        files.save_tensors(partial / TENSORS, tensors)
        described = json.dumps({"version": VERSION, "layers": structure}, indent=1)
        files.write_text(partial / STRUCTURE, described)


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a complete snapshot."""
    return (folder / STRUCTURE).exists()


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Turn ``model``, a fresh instance of the original, into the saved model, in place; returns it.

    Raises:
        PenjingError: the folder is not a snapshot, or not one of this model.
    """
    structure, tensors = _read(folder)
    for name, entry in structure.items():
        if "same_as" in entry:
            model.set_submodule(name, model.get_submodule(entry["same_as"]))
        else:
            _restore(model, name, entry, tensors)
    tensors = {name: value for name, value in tensors.items() if ".weight_format." not in name}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise PenjingError(
            f"{folder} is not a snapshot of this model: {' '.join(str(error).split()):.300}"
        ) from error
    return model


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in SIZES if isinstance(module, kind)), None)


def _description(module: nn.Module) -> dict[str, Any]:
    kind = _kind(module)
    assert kind is not None
    entry: dict[str, Any] = {"kind": kind.__name__, "class": type(module).__qualname__}
    entry["sizes"] = {size: getattr(module, size) for size in SIZES[kind]}
    if isinstance(module, layers.Layer):
        entry["sizes"]["bias"] = module.bias is not None
    if getattr(module, "sparse", False):
        entry["sparse"] = True
    quantizer = getattr(module, "input_quantizer", None)
    if quantizer is not None:
        entry["input_quantizer"] = {"bits": quantizer.bits}
    return entry


def _add_format(
    name: str, module: nn.Module, entry: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    weight_format = getattr(module, "weight_format", None)
    if weight_format is None:
        return
    integer = isinstance(weight_format, layers.IntegerWeights)
    values = weight_format.scale if integer else weight_format.values
    entry["weight_format"] = {"kind": type(weight_format).__name__, "bits": weight_format.bits}
    tensors[f"{name}.weight_format.values"] = values


def _read(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    try:
        described = json.loads((folder / STRUCTURE).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise PenjingError(f"{folder} is not a complete snapshot: {error}") from error
    if described.get("version") != VERSION:
        raise PenjingError(
            f"{folder} is a snapshot of version {described.get('version')}, expected {VERSION}; "
            "save it again."
        )
    return described["layers"], tensors


def _restore(
    model: nn.Module, name: str, entry: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if type(module).__qualname__ != entry["class"]:
        module = _built(name, entry)
        _place(model, name, module)
    assert module is not None
    _resize(module, name, entry, tensors)
    if entry.get("sparse"):
        module.sparse = True  # type: ignore[assignment]
    if "weight_format" in entry:
        made = entry["weight_format"]
        kind = {k.__name__: k for k in (layers.IntegerWeights, layers.CodebookWeights)}[
            made["kind"]
        ]
        values = tensors[f"{name}.weight_format.values"]
        module.weight_format = kind(made["bits"], values)  # type: ignore[assignment]
    if "input_quantizer" in entry:
        quantizer = InputQuantizer(0.0, 1.0, entry["input_quantizer"]["bits"])
        quantizer.freeze()  # its scale and zero point are among the tensors
        input_quantizer.put_on(module, quantizer)


def _built(name: str, entry: dict[str, Any]) -> nn.Module:
    kind = _KINDS.get(entry["kind"])
    if kind is None or entry["class"] != kind.__qualname__:
        raise PenjingError(
            f"The snapshot's layer {name} is a {entry['class']}, which the given model has not; "
            "load it into the model it was made from."
        )
    sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in entry["sizes"].items()}
    return kind(**sizes)


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    # set_submodule would not add the children of a new Sequential.
    model.get_submodule(parent).add_module(child, module)


def _resize(
    module: nn.Module, name: str, entry: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Give ``module`` the sizes of ``entry``, and tensors of the shapes that were saved."""
    for key, value in entry["sizes"].items():
        if key != "bias":
            setattr(module, key, tuple(value) if isinstance(value, list) else value)
    direct = dict.fromkeys([*module._parameters, *module._buffers])
    for key in direct:
        saved = tensors.get(f"{name}.{key}")
        current = getattr(module, key)
        if saved is None:
            if current is not None and key not in module._non_persistent_buffers_set:
                setattr(module, key, None)
        elif current is None or current.shape != saved.shape:
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            value = torch.empty_like(saved, device=device)
            parameter = key in module._parameters
            setattr(module, key, nn.Parameter(value) if parameter else value)
