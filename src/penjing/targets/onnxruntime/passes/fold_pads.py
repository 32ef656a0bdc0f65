"""Move padding before a convolution into the convolution."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers


class FoldPads(InPlacePass):
    """Move a ``Pad`` with zeros over the spatial axes into the ``pads`` of the ``Conv`` it feeds.

    ONNX Runtime does so itself, but only for float convolutions.
    """

    def call(self, model: ir.Model) -> PassResult:
        changed = False
        for node in model.graph:
            pad = node.inputs[0].producer() if node.op_type == "Conv" else None  # type: ignore[union-attr]
            spatial = _spatial_pads(pad) if pad is not None else None
            if spatial is not None:
                own = np.array(node.attributes.get_ints("pads", [0] * len(spatial)))
                node.attributes["pads"] = ir.AttrInt64s("pads", (own + spatial).tolist())
                node.replace_input_with(0, pad.inputs[0])  # type: ignore[union-attr]
                changed = True
        return PassResult(model, changed)


def _spatial_pads(pad: ir.Node) -> np.ndarray | None:
    """Return the pads in ``Conv``'s order (all begins, then all ends); None if ``Conv`` cannot pad
    so."""
    if pad.op_type != "Pad" or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    pads = initializers.constant(pad.inputs[1])
    fill = initializers.constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] else 0.0
    if pads is None or fill is None or np.any(fill) or len(pad.inputs) > 3 or np.any(pads < 0):
        return None
    begins, ends = np.split(pads, 2)
    if np.any(begins[:2]) or np.any(ends[:2]):
        return None
    return np.concatenate([begins[2:], ends[2:]])
