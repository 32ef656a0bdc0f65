"""The command line: one short function a command; all work is in the API.

Nothing heavy is imported before a command needs it, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

import penjing
from penjing.cli import attend, compress, endings, explore, files, train

app = typer.Typer(
    help="Make a trained vision model small and fast enough for a camera device, measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for family in (train, compress, explore, files):
    app.add_typer(family.app)
app.add_typer(attend.app, name="attend")


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
    """Take the options that stand before any command."""
    if debug:
        os.environ[endings.DEBUG] = "1"


def main() -> None:
    """Run the command line; a ``PenjingError`` ends it with one sentence and exit code 2."""
    endings.run(app)
