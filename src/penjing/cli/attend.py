"""Commands of ``penjing attend``: train a detector, run it before a model, measure it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.attention import MOST_EPOCHS, STEPS
from penjing.cli.endings import resumable
from penjing.cli.inputs import Machine, with_options
from penjing.cli.output import print_json, print_table, report, writable
from penjing.errors import PenjingError, invalid
from penjing.progress import say

if TYPE_CHECKING:
    from penjing.attention import Crop, Pipeline
    from penjing.attention.pipeline import Found
    from penjing.attention.video import Shot

app = typer.Typer(
    help="Find the region of interest with a tiny detector; run the model only there.",
    no_args_is_help=True,
)

DETECTOR_HELP = "Detector made by penjing attend train, .penjing or .onnx."
Detector = Annotated[Path | None, typer.Option(help=DETECTOR_HELP)]
Model = Annotated[
    Path | None, typer.Option(help="Model to run on the crops, .onnx or .penjing; needs --crop.")
]
CropFile = Annotated[
    Path | None, typer.Option("--crop", help="YAML file with the settings of one or several crops.")
]
Every = Annotated[int, typer.Option(help="Frames from one run of the detector to the next.")]
MotionGate = Annotated[
    bool, typer.Option("--motion", help="Run the detector only when something moves.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Smallest score of a detection; default: the file's.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the runtime.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command()
@resumable
@with_options
def train(
    machine: Machine,
    data: Annotated[Path, typer.Option(help="COCO JSON with the boxes of the training images.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the detector.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; default: the JSON file's.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="COCO JSON for validation; default: a tenth of the training images."),
    ] = None,
    validation_images: Annotated[
        Path | None, typer.Option(help="Folder of the validation images; default: --images.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="COCO JSON for the test, used once.")] = None,
    test_images: Annotated[
        Path | None, typer.Option(help="Folder of the test images; default: --images.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Largest size of the packed file.")] = "45KB",
    epochs: Annotated[
        float | None,
        typer.Option(
            help=f"Passes over the images; default: {STEPS:,} steps, {MOST_EPOCHS:,} passes at most."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a detector on boxes, quantization-aware at the end; run it again to resume."""
    from penjing import attention, units

    size = int(units.parsed(budget, units.BYTES, "--budget"))
    writable(output / "card.json")
    card = attention.train(
        data,
        images,
        folder=output,
        validation=validation,
        validation_images=validation_images,
        test=test,
        test_images=test_images,
        budget=size,
        epochs=epochs,
        seed=machine.seed,
        threads=machine.measured_threads,
        device=machine.start(),
        progress=True,
    )
    for note in card.notes:
        say(f"note: {note}")
    figures = card.model_dump(mode="json")
    report(figures if as_json else figures | figures["figures"], as_json)


@app.command()
def run(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Image, folder, video, camera.")
    ],
    detector: Detector = None,
    model: Model = None,
    crop: CropFile = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle made by penjing attend bundle.")
    ] = None,
    every: Every = 1,
    motion: MotionGate = False,
    threshold: Threshold = None,
    threads: Threads = 1,
    video: Annotated[
        Path | None, typer.Option(help="Write the frames with boxes to this .mp4 file.")
    ] = None,
    lines: Annotated[
        Path | None,
        typer.Option("--jsonl", help="Write the JSON lines to this file, not to stdout."),
    ] = None,
) -> None:
    """Find objects in frames, run the model on them, and write one line of JSON a frame."""
    from penjing.attention import video as videos

    pipeline = _pipeline(detector, model, crop, bundle, every, motion, threshold, threads)
    for path in (video, lines):
        if path is not None:
            writable(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(lines.open("w")) if lines else sys.stdout
        writer = stack.enter_context(videos.VideoWriter(video)) if video else None

        def show(shot: Shot, found: list[Found]) -> None:
            videos.write_line(file, shot, found)
            if writer is not None:
                writer.rate = shot.rate or writer.rate
                writer.write(videos.draw(shot.frame, found))

        videos.watch(sources, pipeline, show)


@app.command()
def bundle(
    frames: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Frames of the camera to measure latency on."),
    ],
    detector: Annotated[Path, typer.Option(help=DETECTOR_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle to write.")],
    model: Model = None,
    crop: CropFile = None,
    every: Every = 1,
    motion: MotionGate = False,
    threshold: Threshold = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Write detector, crop and model as one file with a card of latencies."""
    from penjing import attention

    pipeline = _pipeline(detector, model, crop, None, every, motion, threshold, threads)
    writable(output)
    card = attention.save(pipeline, output, _frames(frames))
    _show_card(str(output), card, as_json)


MOST_FRAMES = 50
"""Largest number of frames that a bundle is measured on."""


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="Detectors or bundles, one or more.")],
    frames: Annotated[
        list[str] | None, typer.Option(help="Frames of the camera; default: random pixels.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Size of random frames, height x width, px.")
    ] = "720x1280",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Measure the latency of detectors or bundles on this machine, from the decoded frame."""
    from penjing.attention import bundle as bundles

    shots = _frames(frames or []) or [_random_frame(size)]
    rows: list[dict[str, Any]] = [
        {
            "file": str(path),
            "bytes": path.stat().st_size,
            "latencies": bundles.latencies(_loaded(path, threads), shots),
        }
        for path in files
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        _show_card(f"{row['file']}, {row['bytes']:,} bytes", row, False)


def _frames(sources: list[str]) -> list[Any]:
    """Read the first frames of ``sources``."""
    from itertools import islice

    from penjing.attention import video as videos

    shots = (shot.frame for source in sources for shot in videos.read(source))
    return list(islice(shots, MOST_FRAMES))


def _loaded(path: Path, threads: int) -> Pipeline:
    from penjing import attention

    if not path.is_file():
        raise PenjingError(f"{path}: no such file; give a detector or a bundle")
    if path.suffix in (".penjing", ".onnx"):
        return attention.Pipeline(attention.Detector.load(path, threads=threads), threads=threads)
    return attention.load(path, threads=threads)


def _pipeline(
    detector: Path | None,
    model: Path | None,
    crop: Path | None,
    bundle: Path | None,
    every: int,
    motion: bool,
    threshold: float | None,
    threads: int,
) -> Pipeline:
    from penjing import attention

    if (detector is None) == (bundle is None):
        raise PenjingError("give either --detector or --bundle")
    if bundle is not None:
        given = (model, crop, threshold, motion or None, every if every > 1 else None)
        if any(option is not None for option in given):
            raise PenjingError("a bundle has its own settings: leave the other options out")
        return attention.load(bundle, threads=threads)
    if (model is None) != (crop is None):
        raise PenjingError("give --model and --crop together: the crop is the model's input")
    assert detector is not None
    return attention.Pipeline(
        attention.Detector.load(detector, threads=threads, threshold=threshold),
        _crops(crop) if crop else None,
        model,
        every=every,
        motion=attention.Motion() if motion else None,
        threads=threads,
    )


def _crops(path: Path) -> list[Crop]:
    import yaml
    from pydantic import ValidationError

    from penjing.attention import Crop

    try:
        data = yaml.safe_load(path.read_text())
        return [Crop(**entry) for entry in (data if isinstance(data, list) else [data])]
    except OSError as error:
        raise PenjingError(f"cannot read the crop {path}: {error.strerror}") from error
    except ValidationError as error:
        place, reason = invalid(error)
        raise PenjingError(f"{path}: {place or 'crop'}: {reason}") from error
    except (yaml.YAMLError, TypeError) as error:
        raise PenjingError(f"{path} must hold settings such as 'height: 48': {error}") from error


def _random_frame(size: str) -> Any:
    import numpy as np

    from penjing.tasks.preprocessing import parse_size, sides

    height, width = sides(parse_size(size))
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


def _show_card(name: str, card: dict[str, Any], as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        print_json(card)
        return
    table = Table("part", "median ms", "p10 ms", "p90 ms", title=name)
    for part, times in card["latencies"].items():
        table.add_row(part, *(f"{times[key]:.3f}" for key in ("median_ms", "p10_ms", "p90_ms")))
    print_table(table)
