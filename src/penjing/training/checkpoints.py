"""Checkpoints of a training, with everything it depends on, and files of trained weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from penjing import __version__ as penjing_version
from penjing import files, identity
from penjing.errors import PenjingError
from penjing.tasks import Preprocessing, Task
from penjing.training.attached import Attached
from penjing.training.settings import TrainSettings


def save_weights(model: nn.Module, path: Path, preprocessing: Preprocessing | None = None) -> None:
    """Write the model's state to ``path`` as safetensors, atomically, with the ``preprocessing`` that
    it was trained with, if given, which ``models.preprocessing`` reads.

    Raises:
        PenjingError: the disk is full, or the folder cannot be written.
    """
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    stored = {"preprocessing": preprocessing.model_dump_json()} if preprocessing else None
    files.save_tensors(path, tensors, stored)


def start_of(
    model: nn.Module,
    task: Task,
    settings: TrainSettings,
    techniques: Sequence[Attached],
    teacher: nn.Module | None,
) -> dict[str, str]:
    """Return everything that a training depends on, as text, by its name for the user."""
    used = [[type(one.settings), one.settings.model_dump(mode="json")] for one in techniques]
    return {
        "version": f"{penjing_version} {torch.__version__}",
        "settings": json.dumps(settings.model_dump(mode="json", exclude={"time_budget"})),
        "data": task.fingerprint,
        "techniques": identity.of(used).hex(),
        "layers": identity.of(_kinds(model)).hex(),
        "first weights": identity.of(_tensors(model)).hex(),
        "teacher": identity.of(_kinds(teacher), _tensors(teacher)).hex(),
    }


def _kinds(model: nn.Module | None) -> dict[str, str]:
    # Their settings are left out: a model may count its calls, or differ after its first run.
    return {n: type(m).__qualname__ for n, m in model.named_modules()} if model else {}


def _tensors(model: nn.Module | None) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()]) if model else {}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a checkpoint's tensors and metadata.

    Raises:
        PenjingError: the file is no checkpoint, or it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PenjingError(
            f"{path} is not a checkpoint ({error}); delete it, or name another file."
        ) from error
    if metadata.get("checksum") != checksum(tensors):
        raise PenjingError(
            f"{path} is a damaged checkpoint: its contents do not have the checksum that was written; "
            "delete it, or name another file."
        )
    return tensors, metadata


def check_start(path: Path, start: dict[str, str], metadata: dict[str, str]) -> None:
    """Raise PenjingError if ``metadata`` is of a checkpoint of a training with another ``start``."""
    theirs = json.loads(metadata.get("start", "{}"))
    differing = [what for what, value in start.items() if theirs.get(what) != value]
    if differing:
        raise PenjingError(
            f"{path} is the checkpoint of a training with other {' and '.join(differing)}; "
            "delete it, or name another file."
        )


def checksum(tensors: dict[str, Tensor]) -> str:
    """Return the CRC-32 of all names and values, so that a damaged file is not loaded."""
    found = 0
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(plain.numpy().data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"
