"""nncodec, the reference software of ISO/IEC 15938-17, as a peer: what it makes of a trained net.

    pip install --no-deps nncodec==2.1.3    # builds its encoder; it declares numpy below 2
    pip install pandas h5py scikit-learn opencv-python-headless ptflops torchmetrics

It quantizes all tensors of the net as they are (batch norm is not folded: that makes its files worse),
dependent quantization on as by default, at steps of ``qp``, with and without its search for steps by
layer (``opt_qp``). What it does between two settings is interpolated.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

try:
    from nncodec import nn as nncodec
except ImportError:
    nncodec = None
NAME = "nncodec, between its settings"
QPS = range(-12, -40, -2)
"""From coarse to fine."""


@dataclass(frozen=True)
class Answers:
    """What a compressed net says of the test images: top-1, how often that is what the original says,
    and the mean divergence from the original's answers, in nats."""

    score: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class Curve:
    """Bytes, rising, and the answers at each."""

    sizes: list[int]
    answers: list[Answers]

    def at(self, size: int, measure: str) -> float | None:
        """A field of ``Answers`` at as many bytes; None outside the curve."""
        if not self.sizes[0] <= size <= self.sizes[-1]:
            return None
        values = [getattr(one, measure) for one in self.answers]
        return float(np.interp(np.log(size), np.log(self.sizes), values))

    def size_at(self, divergence: float) -> float | None:
        """The bytes at which the answers diverge as much; None outside the curve."""
        seen = np.log([one.divergence for one in self.answers])[::-1]
        if not seen[0] <= np.log(divergence) <= seen[-1]:
            return None
        return float(np.exp(np.interp(np.log(divergence), seen, np.log(self.sizes)[::-1])))


def curves(
    model: nn.Module, judge: Callable[[nn.Module], Answers], size: int, divergence: float
) -> list[Curve]:
    """With and without ``opt_qp``, from the last file below ``size`` bytes to the first whose answers
    diverge less than ``divergence``; none where nncodec is not installed."""
    if nncodec is None:
        return []
    found = [_curve(model, judge, size, divergence, search) for search in (True, False)]
    return [one for one in found if one.sizes]


def _curve(
    model: nn.Module,
    judge: Callable[[nn.Module], Answers],
    size: int,
    divergence: float,
    search: bool,
) -> Curve:
    curve, below = Curve([], []), None
    for qp in QPS:
        coded = _coded(model, qp, search)
        if coded[0] < size:
            below = coded
            continue
        for found, small in [coded] if below is None else [below, coded]:
            curve.sizes.append(found)
            curve.answers.append(judge(small))
            print(f"nncodec, opt_qp {search}: {found} bytes, {curve.answers[-1]}", flush=True)
        below = None
        if curve.answers[-1].divergence < divergence:
            break
    return curve


def _coded(model: nn.Module, qp: int, search: bool) -> tuple[int, nn.Module]:
    """Bytes, and the net that they give back."""
    state = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = {"qp": qp, "opt_qp": search, "verbose": False, "results": folder}
        stream = nncodec.encode(state, settings)
    decoded = nncodec.decode(stream, {"verbose": False})
    coded = copy.deepcopy(model)
    found = {
        name: torch.from_numpy(np.asarray(decoded[name])).reshape(tensor.shape)
        for name, tensor in state.items()
    }
    coded.load_state_dict(found, strict=False)
    return len(stream), coded
