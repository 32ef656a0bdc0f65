"""The commands ``compress`` and ``recipes``: run a recipe, or compress to a size or a score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penjing.cli.endings import resumable
from penjing.cli.inputs import Inputs, Weights, with_options
from penjing.cli.output import Json, print_json, print_rows, report, writable
from penjing.errors import PenjingError
from penjing.progress import say

if TYPE_CHECKING:
    from penjing.devices.artifact import Card
    from penjing.exploration import Budget
    from penjing.recipe import Recipe

app = typer.Typer()


@app.command()
@resumable
@with_options
def compress(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to run: a name from penjing recipes, or a YAML file.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(help="Post-training, instead of a recipe: the best file of, say, 500KB."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            help="Post-training, instead of a recipe: the smallest file with a drop of, say, 1%."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher for knowledge distillation; default: MODEL.")
    ] = None,
    teacher_weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Compress a model by a recipe, post-training or quantization-aware; run it again to resume."""
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
    report(card.model_dump(mode="json"), as_json)
    _judge(card, _limits(max_size, max_drop))


def _judge(card: Card, limits: Budget) -> None:
    """Raise PenjingError if the file surely misses ``limits``; say so on standard error if it may."""
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
    """Load the given recipe, or make one that compresses weights post-training."""
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
    name: Annotated[str | None, typer.Argument(help="Recipe to print as YAML.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that come with penjing, or print one as a start of your own."""
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
