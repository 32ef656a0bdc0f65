"""The commands ``explore``, ``report`` and ``demo``: studies and their pages."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penjing.cli.endings import StoppedError, resumable
from penjing.cli.inputs import Inputs, Machine, with_options
from penjing.cli.output import Json, print_json, print_table, writable
from penjing.errors import PenjingError
from penjing.progress import say

if TYPE_CHECKING:
    from penjing.exploration import Study

app = typer.Typer()


@app.command()
@resumable
@with_options
def explore(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study.")] = Path(
        "study"
    ),
    max_size: Annotated[
        str | None, typer.Option(help="Largest size of the packed file, such as 300KB.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Largest latency of one image, such as 2ms.")
    ] = None,
    max_drop: Annotated[str | None, typer.Option(help="Largest drop in score, such as 1%.")] = None,
    time: Annotated[
        str | None,
        typer.Option(help="Total time, such as 30m, which is the default without --trials."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Total number of candidates; without --time results do not need a clock."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search PTQ, QAT, pruning and all other techniques for the frontier within a budget.

    Run the command again to resume.
    """
    from penjing.exploration import Budget
    from penjing.report import live

    budget = Budget(size=max_size, latency=max_latency, drop=max_drop)
    writable(output / "study.json")
    net, task = inputs.load()
    command = shlex.join(["penjing", *sys.argv[1:]])
    study = live.explore(
        net,
        task,
        budget,
        folder=output,
        time=time,
        trials=trials,
        name=inputs.model,
        data=inputs.data,
        command=command,
        threads=inputs.measured_threads,
    )
    _print_study(study, as_json)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write.")] = Path(
        "report.html"
    ),
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
            help="Total time of the search, such as 60s; 210s, the default, without --trials."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Total number of candidates, with or without --time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small CNN on drawn traffic signs and explore all techniques on it, in minutes."""
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
    try:
        _print_study(study, as_json)
    finally:
        if not as_json:
            typer.echo(demonstration.NEXT_STEPS)


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
            f"give it more --time or --trials, or a wider budget; the frontier is in {study.folder}"
        )
    if doubt := study.doubt():
        say(doubt)
