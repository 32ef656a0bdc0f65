"""Decode maps to boxes: in PyTorch for training, as operators inside the deployed file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass, PassResult
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from penjing.attention.detector import METADATA
from penjing.attention.loss import LARGEST_LOG, boxes_of
from penjing.targets.onnxruntime import initializers

SLOTS = 64
"""Largest number of detections an image."""
OVERLAP = 0.5
"""IoU above which the lower of two detections is suppressed."""
NO_PEAK = -1e4
"""Logit of cells that are no peaks."""


def decode(maps: Tensor) -> Tensor:
    """Decode maps float32 ``[N, 5, h, w]`` (see ``HeatMapNet``) to detections float32 ``[N, 64, 5]``.

    Each is left, top, right, bottom as shares of the image's size, and a score in [0, 1], best
    first; suppressed ones keep their place, with the score 0. A cell counts if it is the highest
    of its 3 x 3 neighbourhood (CenterNet, arXiv:1904.07850); of overlapping boxes the best remains.
    """
    height, width = maps.shape[2:]
    logits = maps[:, :1]
    peaks = logits.where(logits == F.max_pool2d(logits, 3, 1, 1), NO_PEAK).flatten(1)
    slots = min(SLOTS, peaks.shape[1])
    top, cells = peaks.topk(slots)
    boxes = boxes_of(maps[:, 1:]).flatten(1, 2).gather(1, cells[..., None].expand(-1, -1, 4))
    boxes = boxes / maps.new_tensor([width, height, width, height])
    scores = top.sigmoid()
    image = torch.arange(len(maps), device=maps.device).repeat_interleave(slots)
    kept = batched_nms(boxes.flatten(0, 1), scores.flatten(), image, OVERLAP)
    mask = torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view_as(scores)
    return torch.cat([boxes, (scores * mask)[..., None]], dim=2)


class Decoding(InPlacePass):
    """Make ``detections``, as of ``decode``, the graph's output instead of the maps."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        joined = graph.outputs[0].producer()
        assert joined is not None and joined.op_type == "Concat"
        centre, sides = joined.inputs
        assert centre is not None and sides is not None
        shape = graph.outputs[0].shape
        assert shape is not None
        height, width = (side for side in shape[2:] if isinstance(side, int))
        graph.outputs.clear()
        graph.remove(joined, safe=True)
        writer = _Writer(graph)
        detections = _detections(writer, centre, sides, height, width)
        detections.name = "detections"
        detections.dtype = ir.DataType.FLOAT
        slots = min(SLOTS, height * width)
        detections.shape = ir.Shape([graph.inputs[0].shape[0], slots, 5])  # type: ignore[index]
        graph.outputs.append(detections)
        return PassResult(model, True)


class Threshold(InPlacePass):
    """Write the score threshold of detections into the file's metadata."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def call(self, model: ir.Model) -> PassResult:
        model.metadata_props[METADATA] = f"{self.threshold:.9g}"
        return PassResult(model, True)


class _Writer:
    """Append operators and constants to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def __call__(
        self, operator: str, *inputs: ir.Value, outputs: int = 1, **attributes
    ) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes, num_outputs=outputs)
        self.graph.append(node)
        return node.outputs[-1]

    def constant(self, name: str, value: object, kind: type = np.float32) -> ir.Value:
        return initializers.add(self.graph, f"decode_{name}", np.array(value, kind))


def _detections(
    write: _Writer, centre: ir.Value, sides: ir.Value, height: int, width: int
) -> ir.Value:
    logits, cells = _peaks(write, centre, height, width)
    boxes = _boxes(write, sides, cells, height, width)
    scores = write("Sigmoid", logits)
    one = write.constant("axis", [1], np.int64)
    last = write.constant("last", [2], np.int64)
    picked = _picked(write, boxes, write("Unsqueeze", scores, one))
    nothing = write("Sub", scores, scores)
    ones = write("ConstantOfShape", write("Slice", write("Shape", picked), *_bounds(write, 0, 1)),
                 value=ir.tensor(np.ones(1, np.float32)))  # fmt: skip
    mask = write("ScatterND", nothing, picked, ones)
    return write("Concat", boxes, write("Unsqueeze", write("Mul", scores, mask), last), axis=2)


def _peaks(write: _Writer, centre: ir.Value, height: int, width: int) -> tuple[ir.Value, ir.Value]:
    """Write operators that give logits and cells ``[N, K]`` of the highest peaks."""
    highest = write("MaxPool", centre, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    none = write.constant("no_peak", NO_PEAK)
    masked = write("Where", write("Equal", centre, highest), centre, none)
    flat = write("Reshape", masked, write.constant("cells", [0, height * width], np.int64))
    count = write.constant("slots", [min(SLOTS, height * width)], np.int64)
    cells = write("TopK", flat, count, outputs=2, axis=1)
    logits = cells.producer().outputs[0]  # type: ignore[union-attr]
    return logits, cells


def _boxes(write: _Writer, sides: ir.Value, cells: ir.Value, height: int, width: int) -> ir.Value:
    """Write operators that give boxes ``[N, K, 4]`` at ``cells`` as shares of the image."""
    flat = write("Reshape", sides, write.constant("sides", [0, 4, height * width], np.int64))
    rows = write("Unsqueeze", cells, write.constant("first", [1], np.int64))
    index = write("Expand", rows, write.constant("four", [1, 4, 1], np.int64))
    logs = write("GatherElements", flat, index, axis=2)
    limits = write.constant("least", -LARGEST_LOG), write.constant("largest", LARGEST_LOG)
    reach = write("Exp", write("Clip", logs, *limits))
    across = write.constant("width", width, np.int64)
    x = write("Mod", rows, across)
    y = write("Div", rows, across)
    places = write("Cast", write("Concat", x, y, x, y, axis=1), to=ir.DataType.FLOAT)
    signs = write.constant("signs", [[[-1], [-1], [1], [1]]])
    half = write.constant("half", 0.5)
    boxes = write("Add", write("Add", places, half), write("Mul", reach, signs))
    shares = write("Mul", boxes, write.constant("share", _shares(height, width)))
    return write("Transpose", shares, perm=[0, 2, 1])


def _shares(height: int, width: int) -> list:
    return [[[1 / width], [1 / height], [1 / width], [1 / height]]]


def _picked(write: _Writer, boxes: ir.Value, scores: ir.Value) -> ir.Value:
    """Write operators that give image and slot ``[S, 2]`` of boxes after non-maximum suppression."""
    most = write.constant("most", [SLOTS], np.int64)
    overlap = write.constant("overlap", [OVERLAP])
    chosen = write("NonMaxSuppression", boxes, scores, most, overlap)
    return write("Gather", chosen, write.constant("columns", [0, 2], np.int64), axis=1)


def _bounds(write: _Writer, start: int, end: int) -> tuple[ir.Value, ir.Value]:
    return (
        write.constant(f"from_{start}", [start], np.int64),
        write.constant(f"to_{end}", [end], np.int64),
    )
