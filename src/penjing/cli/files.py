"""The commands ``profile``, ``bench``, ``pack``, ``unpack`` and ``inspect`` for models and files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penjing.cli.inputs import Size
from penjing.cli.output import Json, print_json, print_table, report, writable

if TYPE_CHECKING:
    from rich.table import Table

    from penjing.container import Contents

app = typer.Typer()


@app.command()
def profile(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models.")],
    layers: Annotated[bool, typer.Option(help="Print one line a layer.")] = False,
    image_size: Size = None,
    as_json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Count parameters, MACs, activations and weights of models, per layer and in total."""
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
def bench(
    files: Annotated[list[Path], typer.Argument(help="One or more .onnx or .penjing files.")],
    runs: Annotated[int, typer.Option(help="Number of runs of each file, interleaved.")] = 200,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of an input whose size a file leaves open: 1x3x224x224, or, for several "
            "inputs, image=1x3x224x224,mask=1x1x224x224."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure files on this machine: bytes, latency (median, 10th and 90th percentile), peak memory."""
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
    source: Annotated[Path, typer.Argument(help="ONNX file to pack.")],
    target: Annotated[
        Path | None, typer.Argument(help="File to write; default: the source's name, .penjing.")
    ] = None,
    coder: Annotated[str, typer.Option(help="Coder: arithmetic or huffman.")] = "arithmetic",
    as_json: Json = False,
) -> None:
    """Entropy-code an ONNX file into a .penjing file."""
    from penjing import container

    target = target or source.with_suffix(".penjing")
    writable(target)
    packed = container.pack(source, target, coder)  # type: ignore[arg-type]
    size = source.stat().st_size
    figures = {"file": str(target), "bytes": packed, "onnx_bytes": size, "ratio": size / packed}
    report(figures, as_json)


@app.command()
def unpack(
    source: Annotated[Path, typer.Argument(help="File to unpack, .penjing.")],
    target: Annotated[
        Path | None, typer.Argument(help="File to write; default: the source's name, .onnx.")
    ] = None,
) -> None:
    """Restore the ONNX file in a .penjing file, byte for byte."""
    from penjing import container

    target = target or source.with_suffix(".onnx")
    writable(target)
    container.unpack(source, target)


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="File to inspect, .penjing.")],
    as_json: Json = False,
) -> None:
    """List the tensors in a .penjing file with their coders and sizes."""
    from penjing import container

    contents = container.inspect(source)
    if as_json:
        print_json(contents.to_dict())
    else:
        typer.echo(f"{contents.total_bytes:,} bytes, of {contents.onnx_bytes:,} in ONNX: {source}")
        print_table(_contents_table(contents))


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
