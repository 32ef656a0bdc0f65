"""Options that several commands share, said once: the machine, and what is worked on.

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
    """Where to train and calibrate; the deployed file is always measured on the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Spec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, penjing:NAME, FILE.py:FACTORY"
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Trained weights or a checkpoint: .safetensors, or what torch.save made of tensors."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="A folder with train/CLASS/*.jpg, or torchvision:MNIST and such with --root.",
        rich_help_panel=IMAGES,
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(help="Where the torchvision data set lies.", rich_help_panel=IMAGES),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        help="Of the model's input, pixels: a side, as 224, or height x width, as 192x320.",
        rich_help_panel=IMAGES,
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(
        help="Short side before the centre crop, pixels; default: in proportion to the model's own.",
        rich_help_panel=IMAGES,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Per-channel mean of values in 0..1, as 0.5,0.5,0.5.", rich_help_panel=IMAGES
    ),
]
Std = Annotated[
    str | None,
    typer.Option(help="Per-channel standard deviation, as 0.2,0.2,0.2.", rich_help_panel=IMAGES),
]
Interpolation = Annotated[
    str | None, typer.Option(help="bilinear, bicubic or nearest.", rich_help_panel=IMAGES)
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        help="Of all that is random: splits, order, first weights, search. Keep it for one data set.",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Of PyTorch and the runtime; default: every core works, one is measured.",
        rich_help_panel=MACHINE,
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        help="Where to train and calibrate; auto: cuda if there is one.",
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
        """Threads of the runtime whose figures are told."""
        return self.threads or 1

    def start(self) -> torch.device:
        """The device to work on. Seeds PyTorch, sets its threads, says what will be used.

        Raises:
            PenjingError: ``--device cuda`` where PyTorch sees none.
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
        """The model, on its device, and its task, once they fit each other.

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
        """The teacher that ``spec`` names, on the images of ``task``.

        It sees them as it was trained on them, by ``weights`` or by its name, and says so where that
        differs. The options are the student's; they hold for a teacher of the student's name too.
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
        """The model's own preprocessing with the options given on the command line in its place."""
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
    """The model that ``spec`` names, with as many classes as ``task`` has, and as many channels if
    no other number of ``channels`` is given."""
    from penjing import models

    return models.load(
        spec,
        weights=weights,
        num_classes=len(task.classes),
        channels=channels or task.preprocessing.channels,
        new_head=new_head,
    )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: one option for each field of the dataclass that is ``command``'s first
    parameter, and then the options that are its own."""
    signature = inspect.signature(command, eval_str=True)
    first, *own = signature.parameters.values()
    shared = inspect.signature(first.annotation, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        inputs = first.annotation(**{name: given.pop(name) for name in shared})
        command(inputs, **given)

    apart = [p.replace(kind=p.KEYWORD_ONLY) for p in (*shared.values(), *own)]
    # Python's way to say what a function takes (PEP 362), which typer reads.
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
