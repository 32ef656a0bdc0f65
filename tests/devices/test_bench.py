"""bench measures what a user has: any inputs, any sizes, weights beside the file; or says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import graphs
from graphs import FLOAT, INT64, save, value
from penjing import container
from penjing.cli import main
from penjing.devices import measurement
from penjing.devices.local import Local
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import feeds, isolated
from penjing.targets.onnxruntime.isolated import File, running


def bench(path: Path, **settings: Any) -> dict[str, Any]:
    (row,) = measurement.bench([path], runs=3, **settings)
    assert row["runs"] == 3 and row["latency_ms"] > 0 and row["peak_rss_bytes"] > 10**7
    return row


def refused(path: Path, *words: str, **settings: Any) -> None:
    with pytest.raises(PenjingError) as caught:
        bench(path, **settings)
    assert "\n" not in str(caught.value) and "onnxruntime_src" not in str(caught.value)
    for word in [path.name, *words]:
        assert word in str(caught.value)


def same(path: Path, kind: int, shape: Any, *, opset: int = 18, name: str = "x") -> Path:
    """y = x"""
    nodes = [helper.make_node("Identity", [name], ["y"])]
    return save(path, [value(name, kind, shape)], nodes, kind, opset=opset)


def convolution(path: Path, shape: Any) -> Path:
    weight = np.random.default_rng(0).normal(size=(32, 3, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "weight"], ["y"])]
    constants = [numpy_helper.from_array(weight, "weight")]
    return save(path, [value("x", FLOAT, shape)], nodes, constants=constants)


TYPES = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "BOOL"] + [
    f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)
]


@pytest.mark.parametrize("shape", [["n", 3, 4, 5], []], ids=["images", "scalar"])
def test_inputs_of_every_type(shape: list, tmp_path: Path) -> None:
    path = save(
        tmp_path / "types.onnx",
        [value(kind, getattr(TensorProto, kind), shape) for kind in TYPES],
        [helper.make_node("Cast", [kind], [f"{kind}_y"], to=FLOAT) for kind in TYPES]
        + [helper.make_node("Max", [f"{kind}_y" for kind in TYPES], ["y"])],
    )
    assert bench(path)["shapes"] == dict.fromkeys(TYPES, [1, 3, 4, 5] if shape else [])


def test_bfloat16_from_end_to_end(tmp_path: Path) -> None:
    (row,) = Local().latency([same(tmp_path / "half.onnx", TensorProto.BFLOAT16, [2, 3])], runs=3)
    assert row.runs == 3


def test_several_inputs_and_indices(tmp_path: Path) -> None:
    """A mask of truth values, and indices that must lie within a table of 2 rows."""
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["row"]),
        helper.make_node("Where", ["mask", "image", "row"], ["y"]),
    ]
    inputs = [
        value("image", FLOAT, ["n", 3]),
        value("mask", TensorProto.BOOL, ["n", 1]),
        value("index", INT64, ["n"]),
    ]
    table = numpy_helper.from_array(np.ones((2, 3), np.float32), "table")
    row = bench(save(tmp_path / "masked.onnx", inputs, nodes, constants=[table]))
    assert row["shapes"] == {"image": [1, 3], "mask": [1, 1], "index": [1]}
    refused(tmp_path / "masked.onnx", "image", "mask", "NAME=SHAPE", shapes={"": (1, 3)})


def test_no_input(tmp_path: Path) -> None:
    ones = numpy_helper.from_array(np.ones(3, np.float32), "ones")
    nodes = [helper.make_node("Add", ["ones", "ones"], ["y"])]
    row = bench(save(tmp_path / "none.onnx", [], nodes, constants=[ones]))
    assert row["shapes"] == {}
    assert "none" in shown([row])


def shown(rows: list[dict[str, Any]]) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(measurement.table(rows))
    return capture.get()


def test_weights_that_are_inputs_too_are_not_fed(tmp_path: Path) -> None:
    """Files before version 4 of the format."""
    path = convolution(tmp_path / "old.onnx", [1, 3, 8, 8])
    model = onnx.load(path)
    model.graph.input.append(value("weight", FLOAT, [32, 3, 3, 3]))
    onnx.save(model, path)
    assert bench(path)["shapes"] == {"x": [1, 3, 8, 8]}


def test_a_free_height_needs_a_shape(tmp_path: Path) -> None:
    for name, shape in [
        ("names", ["n", 3, "h", "w"]),
        ("nothing", [None, 3, None, None]),
        ("zeros", [0, 3, 0, 0]),
    ]:
        path = convolution(tmp_path / f"{name}.onnx", shape)
        refused(path, "input x", "--shape x=1x3x224x224")
        if name != "zeros":
            row = bench(path, shapes={"x": (2, 3, 9, 8)})
            assert row["shapes"] == {"x": [2, 3, 9, 8]}
    refused(path, "input x", "[2, 4, 9, 8]", "does not fit", shapes={"x": (2, 4, 9, 8)})
    refused(path, "does not fit", shapes={"": (3, 9, 8)})
    with pytest.raises(PenjingError, match=r"input image, .*inputs are x"):
        measurement.bench([path], shapes={"image": (1, 3, 9, 8)})


def test_a_fixed_shape_is_not_changed(tmp_path: Path) -> None:
    path = convolution(tmp_path / "fixed.onnx", ["n", 3, 32, 32])
    refused(path, "[n, 3, 32, 32]", shapes={"": (1, 3, 64, 64)})
    assert bench(path, shapes={"": (4, 3, 32, 32)})["shapes"] == {"x": [4, 3, 32, 32]}


def test_a_size_with_a_name_is_the_same_everywhere(tmp_path: Path) -> None:
    inputs = [value("image", FLOAT, ["n", "h", "w"]), value("mask", FLOAT, ["n", "h", "w"])]
    nodes = [helper.make_node("Mul", ["image", "mask"], ["y"])]
    path = save(tmp_path / "pair.onnx", inputs, nodes)
    refused(path, "image")
    row = bench(path, shapes={"image": (2, 5, 7)})
    assert row["shapes"] == {"image": [2, 5, 7], "mask": [2, 5, 7]}


def test_a_file_that_says_no_shape(tmp_path: Path) -> None:
    path = same(tmp_path / "unsaid.onnx", FLOAT, None)
    refused(path, "input x", "--shape x=1x3x224x224")
    assert bench(path, shapes={"": (1, 3, 4)})["shapes"] == {"x": [1, 3, 4]}


def test_inputs_that_are_no_tensors_of_numbers(tmp_path: Path) -> None:
    refused(same(tmp_path / "text.onnx", TensorProto.STRING, [1]), "input x", "tensor(string)")
    eight = same(tmp_path / "eight.onnx", TensorProto.FLOAT8E4M3FN, [1], opset=21)
    refused(eight, "input x", "float8")
    sequence = helper.make_tensor_sequence_value_info("x", FLOAT, None)
    nodes = [helper.make_node("SequenceLength", ["x"], ["y"])]
    refused(save(tmp_path / "list.onnx", [sequence], nodes, INT64), "input x", "seq(tensor(float))")
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, [2]))
    nodes = [helper.make_node("OptionalHasElement", ["x"], ["y"])]
    maybe = [helper.make_value_info("x", optional)]
    refused(save(tmp_path / "maybe.onnx", maybe, nodes, TensorProto.BOOL), "input x", "optional")


def test_files_that_are_no_onnx_or_too_much_of_it(tmp_path: Path) -> None:
    for name, data in (("text.onnx", b"no model"), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name)
    whole = convolution(tmp_path / "whole.onnx", [1, 3, 8, 8]).read_bytes()
    for size in range(1, len(whole), 371):
        (tmp_path / "torn.onnx").write_bytes(whole[:size])
        refused(tmp_path / "torn.onnx")
    refused(same(tmp_path / "new.onnx", FLOAT, [1], opset=99), "99")
    nodes = [helper.make_node("Blur", ["x"], ["y"], domain="my.company")]
    foreign = tmp_path / "foreign.onnx"
    refused(save(foreign, [value("x", FLOAT, [1])], nodes, domains=["my.company"]), "my.company")
    refused(tmp_path / "missing.onnx", "cannot be read")
    refused(tmp_path, "cannot be read")


def test_a_file_that_fails_when_it_runs(tmp_path: Path) -> None:
    inputs = [value("x", FLOAT, [1, 3]), value("s", INT64, [2])]
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]  # fed with 0: [1, 3], as it is
    assert bench(save(tmp_path / "shaped.onnx", inputs, nodes))["shapes"] == {"x": [1, 3], "s": [2]}
    nodes = [
        helper.make_node("Tile", ["x", "s"], ["z"]),
        helper.make_node("MatMul", ["z", "x"], "y"),
    ]
    refused(save(tmp_path / "fails.onnx", inputs, nodes), "cannot run")


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A convolution and a subgraph whose weights lie in two files beside it."""
    (tmp_path / "beside").mkdir()
    path = convolution(tmp_path / "beside" / "model.onnx", [1, 3, 8, 8])
    model = onnx.load(path)
    weights = numpy_helper.from_array(np.ones(10_000, np.float32), "inner")
    body = helper.make_graph([], "body", [], [value("inner", FLOAT, [10_000])], [weights])
    go = numpy_helper.from_array(np.array(True), "go")
    model.graph.initializer.append(go)
    model.graph.node.append(
        helper.make_node("If", ["go"], ["z"], then_branch=body, else_branch=body)
    )
    model.graph.output.append(value("z", FLOAT, [10_000]))
    for tensor, name in [
        (model.graph.initializer[0], "weights.bin"),
        (model.graph.node[1].attribute[0].g.initializer[0], "inner.bin"),
        (model.graph.node[1].attribute[1].g.initializer[0], "inner.bin"),
    ]:
        onnx.external_data_helper.set_external_data(tensor, name, 0, len(tensor.raw_data))
        (path.parent / name).write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_the_file_count(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in beside.parent.iterdir() if path.is_file()]
    assert len(files) == 3
    row = bench(beside)
    assert row["bytes"] == sum(path.stat().st_size for path in files) > 43_000
    assert row["data_files"] == [str(beside.parent / name) for name in ("inner.bin", "weights.bin")]
    assert "weights.bin" in shown([row])
    monkeypatch.chdir(beside.parent)
    assert bench(Path("model.onnx"))["data_files"] == ["inner.bin", "weights.bin"]


@pytest.mark.parametrize("name", ["weights.bin", "inner.bin"])
def test_weights_that_are_missing(beside: Path, name: str) -> None:
    (beside.parent / name).unlink()
    refused(beside, name, "missing")


@pytest.mark.parametrize("absolute", [True, False])
def test_weights_outside_the_folder(beside: Path, absolute: bool) -> None:
    outside = beside.parents[1] / "weights.bin"
    shutil.copy(beside.parent / "weights.bin", outside)
    model = onnx.load(beside, load_external_data=False)
    location = str(outside) if absolute else "../weights.bin"
    (entry,) = [e for e in model.graph.initializer[0].external_data if e.key == "location"]
    entry.value = location
    beside.write_bytes(model.SerializeToString())
    refused(beside, location, "outside")


def test_a_packed_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    free = convolution(tmp_path / "free.onnx", ["n", 3, "h", "w"])
    container.pack(free, packed := tmp_path / "free.penjing")
    refused(packed, "--shape x=1x3x224x224")
    row = bench(packed, shapes={"": (1, 3, 8, 8)})
    assert (row["file"], row["bytes"]) == (str(packed), packed.stat().st_size)
    (tmp_path / "torn.penjing").write_bytes(packed.read_bytes()[:-9])
    refused(tmp_path / "torn.penjing")


def test_runs_and_threads_are_those_asked_for(tmp_path: Path) -> None:
    path = graphs.doubling(tmp_path / "double.onnx")
    rows = measurement.bench([path, path], runs=57, threads=2)
    assert [(row["runs"], row["threads"]) for row in rows] == [(57, 2)] * 2
    assert "2 threads" in shown(rows)
    for wrong in ({"runs": 0}, {"threads": 0}):
        with pytest.raises(PenjingError, match="at least 1"):
            measurement.bench([path], **wrong)


@pytest.mark.skipif(not isolated.FORKS, reason="jobs are forked on Linux only")
def test_the_runtime_has_so_many_threads(tmp_path: Path) -> None:
    path = graphs.doubling(tmp_path / "double.onnx")
    for threads in (1, 3):
        with running(File(path), threads) as outputs_of:
            outputs_of(np.zeros((1, 3, 4, 4), np.float32))
            assert isolated._kept.server is not None
            (job,) = psutil.Process(isolated._kept.server.process.pid).children()
            assert job.num_threads() == threads


def test_memory_is_that_of_the_shape(tmp_path: Path) -> None:
    """32 channels of 510 x 510 are 33 MB."""
    path = convolution(tmp_path / "free.onnx", ["n", 3, "h", "w"])
    rows = [bench(path, shapes={"": (1, 3, side, side)}) for side in (8, 512)]
    assert rows[1]["peak_rss_bytes"] - rows[0]["peak_rss_bytes"] > 25_000_000


def test_the_command_takes_a_shape(tmp_path: Path) -> None:
    path = convolution(tmp_path / "free.onnx", ["n", 3, "h", "w"])
    command = ["bench", str(path), "--runs", "3", "--json"]
    result = CliRunner().invoke(main.app, [*command, "--shape", "x=1x3x20x30"])
    (row,) = json.loads(result.stdout)
    assert row["shapes"] == {"x": [1, 3, 20, 30]} and row["runs"] == 3
    assert isinstance(CliRunner().invoke(main.app, command).exception, PenjingError)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("1x3x224x192", {"": (1, 3, 224, 192)}),
        ("7", {"": (7,)}),
        ("a=1x3,b:0=2x4, c=", {"a": (1, 3), "b:0": (2, 4), "c": ()}),
        ("a=b=1", {"a=b": (1,)}),
    ],
)
def test_shapes_as_they_are_written(text: str, shapes: dict) -> None:
    assert feeds.parse(text) == shapes


@pytest.mark.parametrize("text", ["", "1x", "ax3", "a=1x-3", "1.5x3", "1x3;2", "=", "a=1,,b=2"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(PenjingError, match="--shape"):
        feeds.parse(text)
