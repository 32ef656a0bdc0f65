"""From a compressed PyTorch model to an ONNX file that really runs on integers."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass
from torch import Tensor, nn

from penjing import container, layers
from penjing.deploy.deployed_layer import DeployedLayer, take_layers
from penjing.deploy.passes import PlainGraph, lowering
from penjing.errors import PenjingError
from penjing.folding import fold_batch_norm
from penjing.layers import IntegerWeights


def export(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    calibration: Sequence[Tensor] = (),
    finish: Sequence[InPlacePass] = (),
) -> list[str]:
    """Write ``model`` to ``path`` as ONNX with weights stored as they are counted.

    Args:
        model: a baked model, on any device; it is not changed.
        example: one input, float32 ``[1, C, H, W]`` (or what ``model`` takes); the batch axis of the
            file is free.
        path: the ``.onnx`` file to write.
        calibration: batches like ``example``. Needed when a layer has an 8-bit input: the results
            that no layer's own quantizer describes (of additions, poolings...) get their ranges
            from them.
        finish: passes that run on the lowered graph. After them, what no runtime reads is left out.

    Returns:
        One sentence for every group of layers that does not run on its stored integers.

    Raises:
        PenjingError: a layer needs calibration and there is none, or the model cannot be exported.
    """
    model = copy.deepcopy(model).cpu().eval()
    if not any(hasattr(m, "weight_format") for m in layers.compressible(model).values()):
        fold_batch_norm(model, example)
    taken = take_layers(model)
    graph = _to_onnx(model, example, opset=_opset(taken))
    notes: list[str] = []
    lowered = lowering(taken, [batch.numpy() for batch in calibration], notes)
    for step in (*lowered, *finish, PlainGraph()):
        step(graph)
    ir.save(graph, str(path))
    return notes


def packed_bytes(model: nn.Module, example: Tensor) -> int:
    """Bytes of the ``.penjing`` file of ``model``; the file is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "model.onnx")
        export(model, example, graph)
        return container.pack(graph, Path(folder, "model.penjing"))


def _opset(taken: list[DeployedLayer]) -> int:
    """The oldest operator set that can store the weights: more runtimes read an older one."""
    two_bits = any(isinstance(t.format, IntegerWeights) and t.format.bits == 2 for t in taken)
    return 25 if two_bits else 21


def _to_onnx(model: nn.Module, example: Tensor, opset: int) -> ir.Model:
    # An example of one image would fix the batch axis at one, another memory order its strides.
    pair = torch.cat([example, example]).contiguous()
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (pair,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["image"],
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:
        raise PenjingError(
            f"the model {type(model).__name__} cannot be exported to ONNX for an input of shape "
            f"{tuple(example.shape)}: {error}; change the part of its forward that is named here."
        ) from error
    assert program is not None
    graph = program.model
    graph.ir_version = 13 if opset == 25 else 10
    return graph


@contextlib.contextmanager
def _quiet():
    """Keep the exporter's progress and deprecation notices off the user's terminal."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
