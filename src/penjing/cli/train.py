"""The command ``train``: train a model's weights on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.cli.endings import resumable
from penjing.cli.inputs import Inputs, with_options
from penjing.cli.output import Json, report, writable
from penjing.errors import PenjingError, invalid

if TYPE_CHECKING:
    from penjing.training import TrainSettings

app = typer.Typer()


@app.command()
@resumable
@with_options
def train(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", help="File of weights to write.")],
    epochs: Annotated[float, typer.Option(help="Passes over the training images.")] = 10.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    as_json: Json = False,
) -> None:
    """Train or fine-tune a model and write its weights; run the command again to resume."""
    from penjing import training
    from penjing.tasks import evaluate

    writable(output)
    net, task = inputs.load(new_head=True)
    settings = _train_settings(epochs=epochs, batch_size=batch_size, lr=lr)
    checkpoint = output.with_suffix(".checkpoint")
    result = training.train(net, task, settings, checkpoint=checkpoint, progress=True)
    training.save_weights(net, output, task.preprocessing)
    # A later training on other data would reject it.
    checkpoint.unlink(missing_ok=True)
    figures: dict[str, Any] = {
        "weights": str(output),
        "epochs": result.epochs,
        "seconds": round(result.seconds, 1),
        "validation_score": result.score,
        "test_score": evaluate(net, task, "test") if task.has_test else None,
    }
    report(figures, as_json)


def _train_settings(**options: Any) -> TrainSettings:
    from pydantic import ValidationError

    from penjing.training import TrainSettings

    try:
        return TrainSettings(**options)
    except ValidationError as error:
        place, reason = invalid(error)
        raise PenjingError(f"--{place.replace('_', '-')} {reason}") from error
