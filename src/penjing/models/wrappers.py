"""Wrappers that trainers put around a model, removed before compression."""

from __future__ import annotations

import torch
from torch import nn

from penjing.errors import PenjingError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        PenjingError: the model is TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise PenjingError(
            f"the model is TorchScript ({type(model).__name__}), whose layers cannot be changed; "
            "load its weights into the Python class that it was made from."
        )
    while isinstance(inner := _wrapped(model), nn.Module):
        model = inner
    return model


def _wrapped(module: nn.Module) -> object:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    return module.__dict__.get("_modules", {}).get("_orig_mod")
