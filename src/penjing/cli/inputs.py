"""Options that several commands share: the machine, the model and the data.

typer makes options of a function's parameters, and has no parameter that stands for several.
``with_options`` gives it one: a parameter whose type is one of the dataclasses here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.errors import PenjingError
from penjing.progress import say

if TYPE_CHECKING:
    import torch
    from torch import nn

    from penjing.tasks import Preprocessing, Task

MACHINE = "Machine"
IMAGES = "Data and preprocessing"


class Device(StrEnum):
    """Device to train and calibrate on; the deployed file is always measured on the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Spec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model: torchvision:NAME, timm:NAME, penjing:NAME or FILE.py:FACTORY.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Trained weights or a checkpoint: .safetensors, or tensors written by torch.save."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="Data set: a folder with train/CLASS/*.jpg, or torchvision:NAME with --root.",
        rich_help_panel=IMAGES,
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(help="Folder of the torchvision data set.", rich_help_panel=IMAGES),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        help="Size of the model's input, px: a side, as 224, or height x width, as 192x320.",
        rich_help_panel=IMAGES,
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(
        help="Short side before the centre crop, px; default: in proportion to the model's own.",
        rich_help_panel=IMAGES,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean of each channel, for pixels in 0..1, as 0.5,0.5,0.5.", rich_help_panel=IMAGES
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        help="Standard deviation of each channel, as 0.2,0.2,0.2.", rich_help_panel=IMAGES
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(help="Interpolation: bilinear, bicubic or nearest.", rich_help_panel=IMAGES),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        help="Random seed of splits, order, initial weights and search; keep it for one data set.",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads of PyTorch and the runtime; default: all cores to work, one to measure.",
        rich_help_panel=MACHINE,
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        help="Device to train and calibrate on; auto: cuda if there is one.",
        rich_help_panel=MACHINE,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Options of every command that trains or calibrates."""

    seed: Seed = 0
    threads: Threads = None
    device: DeviceOption = Device.AUTO

    @property
    def measured_threads(self) -> int:
        """Threads of the runtime with which files are measured."""
        return self.threads or 1

    def start(self) -> torch.device:
        """Seed PyTorch, set its threads, say what will be used, and return the device to work on.

        Raises:
            PenjingError: ``--device cuda`` was given, but PyTorch sees no CUDA device.
        """
        import torch

        device = self._chosen(torch.cuda.is_available())
        torch.manual_seed(self.seed)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        place = torch.cuda.get_device_name(device) if device == "cuda" else device
        say(
            f"on {place}, {_counted(torch.get_num_threads(), 'thread')}, seed {self.seed}; "
            f"files are measured on the CPU with {_counted(self.measured_threads, 'thread')}"
        )
        return torch.device(device)

    def _chosen(self, available: bool) -> str:
        if self.device is Device.CUDA and not available:
            raise PenjingError(
                "--device cuda: PyTorch sees no CUDA device here; install its CUDA build and a "
                "driver, or give --device cpu"
            )
        automatic = Device.CUDA if available else Device.CPU
        return (automatic if self.device is Device.AUTO else self.device).value


@dataclass(frozen=True, kw_only=True)
class Inputs(Machine):
    """Options of every command that works on a model and data."""

    model: Spec
    data: Data
    weights: Weights = None
    root: Root = None
    image_size: Size = None
    resize: Resize = None
    mean: Mean = None
    std: Std = None
    interpolation: Interpolation = None

    def load(self, *, new_head: bool = False) -> tuple[nn.Module, Task]:
        """Load the model, on its device, and its task, and check that they fit each other.

        Args:
            new_head: take weights for other classes too, and leave the last layer untrained.

        Raises:
            PenjingError: one of the two cannot be read, or the model does not take the images.
        """
        from penjing import models, tasks

        device = self.start()
        preprocessing = self._preprocessing(models.preprocessing(self.model, weights=self.weights))
        task = tasks.load(self.data, preprocessing, root=self.root, seed=self.seed)
        say(tasks.describe(task))
        net = model_for(task, self.model, self.weights, new_head=new_head).to(device)
        task.check(net)
        return net, task

    def teacher(self, task: Task, spec: str, weights: Path | None) -> nn.Module:
        """Load the teacher that ``spec`` names, for the images of ``task``.

        It has the preprocessing it was trained with, by ``weights`` or by its name; if that differs
        from the student's, a line on standard error says so. The options are the student's; they hold
        for a teacher of the student's name too.
        """
        from penjing import models

        stored = models.stored_preprocessing(weights) if weights else None
        known = None if spec == self.model else models.preprocessing(spec)
        own = stored or known or task.preprocessing
        net = model_for(task, spec, weights, channels=own.channels)
        seen = models.renormalized(net, task.preprocessing, own)
        if seen is not net:
            say(
                f"the teacher sees {own.height} x {own.width} pixels, {own.channels} channels, mean "
                f"{own.mean}, std {own.std}"
            )
        return seen

    def _preprocessing(self, known: Preprocessing | None) -> Preprocessing | None:
        """Replace fields of the model's own preprocessing by options of the command line."""
        from penjing.tasks.preprocessing import adapted, parse_size

        return adapted(
            known,
            size=parse_size(self.image_size) if self.image_size else None,
            resize=self.resize,
            mean=_floats(self.mean, "--mean"),
            std=_floats(self.std, "--std"),
            interpolation=self.interpolation,
        )


def model_for(
    task: Task,
    spec: str,
    weights: Path | None,
    *,
    channels: int | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Load the model that ``spec`` names, with as many classes as ``task`` has, and as many channels
    unless ``channels`` is given."""
    from penjing import models

    return models.load(
        spec,
        weights=weights,
        num_classes=len(task.classes),
        channels=channels or task.preprocessing.channels,
        new_head=new_head,
    )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``command`` for typer: it gets one option for each field of the dataclass that is its
    first parameter, and then its own options."""
    signature = inspect.signature(command, eval_str=True)
    first, *own = signature.parameters.values()
    shared = inspect.signature(first.annotation, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        inputs = first.annotation(**{name: given.pop(name) for name in shared})
        command(inputs, **given)

    apart = [p.replace(kind=p.KEYWORD_ONLY) for p in (*shared.values(), *own)]
    # typer reads a function's parameters from its signature (PEP 362).
    run.__signature__ = signature.replace(parameters=apart)  # type: ignore[attr-defined]
    return run


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _floats(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise PenjingError(
            f"{option} must be numbers with commas between, found {text!r}"
        ) from error
