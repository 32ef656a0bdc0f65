"""The command line: one short function a command; all work is in the API.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import penjing
from penjing.cli import attend, endings
from penjing.cli.endings import StoppedError, resumable
from penjing.cli.inputs import Inputs, Machine, Size, Weights, with_options
from penjing.cli.output import print_json, print_rows, print_table, writable
from penjing.cli.output import report as report_figures
from penjing.errors import PenjingError, invalid
from penjing.progress import say

if TYPE_CHECKING:
    from rich.table import Table

    from penjing.container import Contents
    from penjing.devices.artifact import Card
    from penjing.exploration import Budget, Study
    from penjing.recipe import Recipe
    from penjing.training import TrainSettings

app = typer.Typer(
    help="Make a trained vision model small and fast enough for a camera device, measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(attend.app, name="attend")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"penjing {penjing.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an unexpected error comes from.")
    ] = False,
) -> None:
    if debug:
        os.environ[endings.DEBUG] = "1"


@app.command()
def profile(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models.")],
    layers: Annotated[bool, typer.Option(help="One line a layer.")] = False,
    image_size: Size = None,
    as_json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Parameters, MACs, activations and weights of models, per layer and in total."""
    from penjing.net import profiling
    from penjing.tasks.preprocessing import parse_size

    size = parse_size(image_size) if image_size else None
    profiles = [profiling.profile_spec(spec, size) for spec in models]
    if as_json:
        print_json([entry.to_dict() for entry in profiles])
    elif csv:
        sys.stdout.write(profiling.to_csv(profiles))
    elif layers:
        for entry in profiles:
            print_table(profiling.layer_table(entry))
    else:
        print_table(profiling.table(profiles))


@app.command()
@resumable
@with_options
def train(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the weights.")],
    epochs: Annotated[float, typer.Option(help="Passes over the training images.")] = 10.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    as_json: Json = False,
) -> None:
    """Train a model and write its weights (.safetensors). A stopped training resumes."""
    from penjing import training
    from penjing.tasks import evaluate

    writable(output)
    net, task = inputs.load(new_head=True)
    settings = _train_settings(epochs=epochs, batch_size=batch_size, lr=lr)
    checkpoint = output.with_suffix(".checkpoint")
    result = training.train(net, task, settings, checkpoint=checkpoint, progress=True)
    training.save_weights(net, output, task.preprocessing)
    # It would hold up a training on other data.
    checkpoint.unlink(missing_ok=True)
    figures: dict[str, Any] = {
        "weights": str(output),
        "epochs": result.epochs,
        "seconds": round(result.seconds, 1),
        "validation_score": result.score,
        "test_score": evaluate(net, task, "test") if task.has_test else None,
    }
    report_figures(figures, as_json)


@app.command()
@resumable
@with_options
def compress(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")],
    recipe: Annotated[
        str | None, typer.Option(help="Name of one of penjing recipes, or a YAML file.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Instead: the best file without training of, say, 500KB.")
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Instead: the smallest file without training, losing 1%, say."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to distill from; default: MODEL.")
    ] = None,
    teacher_weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Run one recipe, or compress weights to a size or a score; write and measure the artifact."""
    from penjing import recipe as recipes
    from penjing.devices import artifact
    from penjing.devices.local import Local

    steps = _steps(recipe, max_size, max_drop)
    if not steps.techniques:
        say(f"recipe {steps.name!r} has no techniques: the file is the model as it is")
    writable(output / "card.json")
    net, task = inputs.load()
    guide = inputs.teacher(task, teacher, teacher_weights) if teacher else None
    if guide is not None:
        guide.to(next(net.parameters()).device)
    small = recipes.compress(net, task, steps, teacher=guide, cache=output / "cache", progress=True)
    device, before = Local(inputs.measured_threads), output / "original"
    artifact.build(net, task, before, recipe={"name": "original"}, device=device)
    card = artifact.build(
        small,
        task,
        output,
        recipe=steps.to_dict(),
        reference=artifact.original(net, task, before),
        device=device,
    )
    for note in card.notes:
        say(f"note: {note}")
    report_figures(card.model_dump(mode="json"), as_json)
    _judge(card, _limits(max_size, max_drop))


def _judge(card: Card, limits: Budget) -> None:
    """Say on standard error what the file is not, as an error where that is certain."""
    from penjing.exploration.budget import describe
    from penjing.tasks import interval

    if over := limits.excess(card.packed_bytes, card.latency_ms, drop=0.0):
        raise PenjingError(f"the file has {describe(over)}; allow a larger file, or prune first")
    state = "met" if limits.drop is None else card.state(limits.drop)
    if state == "missed":
        raise PenjingError(
            f"the file loses {interval.described(card)} of at most {limits.drop:.2%}; "
            "allow a larger drop"
        )
    if state == "cannot be told":
        needed = card.images_needed(limits.drop or 0.0)
        enough = f"; about {needed:,} validation images would tell" if needed else ""
        say(
            f"whether the drop is at most {limits.drop:.2%} cannot be told: it is "
            f"{interval.described(card)}{enough}"
        )


def _steps(recipe: str | None, max_size: str | None, max_drop: str | None) -> Recipe:
    """The recipe asked for, or one that compresses weights without training."""
    from penjing import recipe as recipes
    from penjing.techniques.compress_weights import CompressWeights

    if sum(aim is not None for aim in (recipe, max_size, max_drop)) != 1:
        raise PenjingError("give one of --recipe, --max-size and --max-drop")
    if recipe is not None:
        return recipes.load(recipe)
    budget = _limits(max_size, max_drop)
    size = None if budget.size is None else int(budget.size)
    technique = CompressWeights(max_bytes=size, max_drop=budget.drop)
    return recipes.Recipe(name="smallest", stages=[recipes.Stage(techniques=[technique])])


def _limits(max_size: str | None, max_drop: str | None) -> Budget:
    from penjing.exploration import Budget

    return Budget(size=max_size, drop=max_drop)


@app.command("recipes")
def recipes_command(
    name: Annotated[str | None, typer.Argument(help="Print this one's YAML.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that come with penjing, or print one to start your own from."""
    import yaml

    from penjing.recipes import read, shipped

    if name is not None:
        typer.echo(read(name), nl=False)
        return
    known = [yaml.safe_load(read(recipe)) for recipe in shipped()]
    if as_json:
        print_json(known)
    else:
        print_rows((recipe["name"], recipe["about"]) for recipe in known)


@app.command()
@resumable
@with_options
def explore(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study.")] = Path(
        "study"
    ),
    max_size: Annotated[str | None, typer.Option(help="Of the packed file, such as 300KB.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Of one image, such as 2ms.")] = None,
    max_drop: Annotated[str | None, typer.Option(help="Loss of score, such as 1%.")] = None,
    time: Annotated[
        str | None,
        typer.Option(help="In total, such as 30m, which is the default without --trials."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="How many candidates in total; without --time no choice needs a clock."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search all techniques together for the frontier within a budget. Run again to resume."""
    from penjing import exploration

    budget = exploration.Budget(size=max_size, latency=max_latency, drop=max_drop)
    writable(output / "study.json")
    net, task = inputs.load()
    command = shlex.join(["penjing", *sys.argv[1:]])
    study = exploration.explore(
        net,
        task,
        budget,
        folder=output,
        time=time,
        trials=trials,
        name=inputs.model,
        data=inputs.data,
        command=command,
    )
    _print_study(study, as_json)


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="model.onnx or model.penjing, one or more.")],
    runs: Annotated[int, typer.Option(help="Runs of each file, interleaved.")] = 200,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Of an input whose size a file leaves open: 1x3x224x224, or, for several inputs, "
            "image=1x3x224x224,mask=1x1x224x224."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure artifacts on this machine: bytes, median latency and its spread, memory."""
    from penjing.devices import measurement
    from penjing.targets.onnxruntime import feeds

    shapes = feeds.parse(shape) if shape else None
    rows = measurement.bench(files, runs=runs, threads=threads, shapes=shapes)
    if as_json:
        print_json(rows)
    else:
        print_table(measurement.table(rows))


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="An .onnx file.")],
    target: Annotated[Path | None, typer.Argument(help="Default: the same name, .penjing.")] = None,
    coder: Annotated[str, typer.Option(help="arithmetic or huffman.")] = "arithmetic",
    as_json: Json = False,
) -> None:
    """Entropy-code an ONNX file into a .penjing file."""
    from penjing import container

    target = target or source.with_suffix(".penjing")
    writable(target)
    packed = container.pack(source, target, coder)  # type: ignore[arg-type]
    size = source.stat().st_size
    figures = {"file": str(target), "bytes": packed, "onnx_bytes": size, "ratio": size / packed}
    report_figures(figures, as_json)


@app.command()
def unpack(
    source: Annotated[Path, typer.Argument(help="A .penjing file.")],
    target: Annotated[Path | None, typer.Argument(help="Default: the same name, .onnx.")] = None,
) -> None:
    """Restore the ONNX file in a .penjing file, byte for byte."""
    from penjing import container

    target = target or source.with_suffix(".onnx")
    writable(target)
    container.unpack(source, target)


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="A .penjing file.")], as_json: Json = False
) -> None:
    """What a .penjing file holds, tensor by tensor."""
    from penjing import container

    contents = container.inspect(source)
    if as_json:
        print_json(contents.to_dict())
    else:
        typer.echo(f"{contents.total_bytes:,} bytes, of {contents.onnx_bytes:,} in ONNX: {source}")
        print_table(_contents_table(contents))


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
) -> None:
    """Write a study as one self-contained HTML page."""
    from penjing import report as pages

    writable(output)
    pages.write(study, output)
    say(f"wrote {output}")


@app.command()
@resumable
@with_options
def demo(
    machine: Machine,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study.")] = Path(
        "penjing-demo"
    ),
    time: Annotated[
        str | None,
        typer.Option(
            help="Of the search in total, such as 30s; 150s, the default, without --trials."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates in total, instead of, or beside, --time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small CNN on handwritten digits and explore all techniques on it, in minutes."""
    from penjing.cli import demonstration

    writable(output / "study.json")
    device = machine.start()
    study = demonstration.run(
        output,
        time=time,
        trials=trials,
        seed=machine.seed,
        device=device,
        threads=machine.measured_threads,
    )
    _print_study(study, as_json)


def main() -> None:
    """Run the command line; what a user can put right is one sentence and exit code 2."""
    endings.run(app)


def _train_settings(**options: Any) -> TrainSettings:
    from pydantic import ValidationError

    from penjing.training import TrainSettings

    try:
        return TrainSettings(**options)
    except ValidationError as error:
        place, reason = invalid(error)
        raise PenjingError(f"--{place.replace('_', '-')} {reason}") from error


def _show_study(study: Study, as_json: bool) -> None:
    from penjing import report as pages

    if as_json:
        print_json(study.to_dict())
    else:
        print_table(pages.table(study.to_dict()))
        say(f"report: {study.folder / 'report.html'}")
    if study.best is not None and (notes := study.best.point.notes):
        more = f" (and {len(notes) - 1} more in its card.json)" if notes[1:] else ""
        say(f"note on {study.best.name}: {notes[0]}{more}")


def _print_study(study: Study, as_json: bool) -> None:
    from penjing.exploration.budget import describe

    if study.points:
        _show_study(study, as_json)
    if study.stopped:
        raise StoppedError
    if study.best is None:
        point, excess = study.nearest()
        raise PenjingError(
            f"no point met the budget; the nearest is {point.name} ({describe(excess)}): "
            f"give it more --time or a wider budget, the frontier is in {study.folder}"
        )
    if doubt := study.doubt():
        say(doubt)


def _contents_table(contents: Contents) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("tensor", "type", "shape", "coder", box=SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for heading in ("bytes", "raw bytes", "bits/weight"):
        table.add_column(heading, justify="right")
    for tensor in contents.tensors:
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        coded = "–" if tensor.coded_bytes is None else f"{tensor.coded_bytes:,}"
        bits = "–" if tensor.bits_per_weight is None else f"{tensor.bits_per_weight:.2f}"
        figures = (coded, f"{tensor.raw_bytes:,}", bits)
        table.add_row(tensor.name, tensor.dtype, shape, tensor.coder, *figures)
    table.add_section()
    table.add_row("graph", "", "", contents.skeleton_coder, f"{contents.skeleton_bytes:,}", "", "")
    return table
