import json
from pathlib import Path

from torch import nn

from penjing import container
from penjing.devices import artifact
from penjing.tasks import Task
from penjing.techniques.quantize import quantize


def test_build_writes_the_files_and_a_card(net: nn.Module, task: Task, tmp_path: Path) -> None:
    small = quantize(net, task, weight_bits=4, calibration=32)
    reference = artifact.build(net, task, tmp_path / "original", recipe=None)
    card = artifact.build(
        small,
        task,
        tmp_path / "small",
        recipe={"name": "int4"},
        reference=artifact.original(net, task, tmp_path / "original"),
    )
    assert card.onnx_bytes == (tmp_path / "small" / "model.onnx").stat().st_size
    assert card.packed_bytes == (tmp_path / "small" / "model.penjing").stat().st_size
    assert card.packed_bytes < reference.packed_bytes
    assert (card.params, card.macs) == (
        reference.params - 48,  # two norms are gone, one bias has come
        reference.macs,
    )
    assert card.reference_latency_ms is not None and reference.reference_latency_ms is None
    assert card.export_top1_agreement > 0.9
    assert {layer["name"]: layer["format"] for layer in card.layers}["branch"] == "int4"
    assert any("branch" in note for note in card.notes)
    assert (
        artifact.Card.model_validate(json.loads((tmp_path / "small/card.json").read_text())) == card
    )


def test_the_packed_file_is_the_file(net: nn.Module, task: Task, tmp_path: Path) -> None:
    artifact.build(net, task, tmp_path, recipe=None)
    container.unpack(tmp_path / "model.penjing", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
