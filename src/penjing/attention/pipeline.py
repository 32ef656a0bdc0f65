"""The pipeline: a detector finds objects in a frame, and the model runs on crops of them only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.attention.crop import Crop
from penjing.attention.detector import onnx_bytes
from penjing.attention.motion import Gate, Motion
from penjing.attention.tracker import Tracker
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import runtime
from penjing.tasks.frames import check

if TYPE_CHECKING:
    from torch import nn

LARGEST_MODEL = 2**30
"""Largest size of a model's ONNX file, bytes, also after unpacking."""

Frame = NDArray[np.uint8]
Model = Callable[[NDArray[np.float32]], Any]


@dataclass(frozen=True)
class Found:
    """An object in a frame.

    Attributes:
        box: left, top, right, bottom in the frame's pixels.
        score: score of the object's last detection, in [0, 1].
        track: number of the object, the same in all frames.
        output: the model's output for the crop; with several crops a list, in their order, up to one
            that was enough.
    """

    box: tuple[float, float, float, float]
    score: float
    track: int
    output: Any = None


class Pipeline:
    """A detector in front of a model.

    Args:
        detector: finds objects in a frame.
        crop: settings of the model's input; several give the model as many views of an object, one
            after another.
        model: a PyTorch module, an ``.onnx`` or ``.penjing`` file, or any function of crops float32
            ``[n, C, height, width]`` that gives an array ``[n, ...]``; None finds objects only. It
            is not run when nothing is found. Crops of one size are run together.
        every: frames from one run of the detector to the next; a tracker follows the objects between.
        motion: settings of a motion gate before the detector; None is no gate.
        postprocess: converts one object's output (or list of outputs) to ``Found.output``.
        enough: whether an output is so good that the object's other views need not be run.
        threads: threads of the runtime, for a file.

    Raises:
        PenjingError: only one of model and crop is given, the file cannot be read, or its input does
            not fit the crop.
    """

    def __init__(
        self,
        detector: Callable[[Frame], NDArray[np.float32]],
        crop: Crop | Sequence[Crop] | None = None,
        model: nn.Module | str | Path | Model | None = None,
        *,
        every: int = 1,
        motion: Motion | None = None,
        postprocess: Callable[[Any], Any] | None = None,
        enough: Callable[[Any], bool] | None = None,
        threads: int = 1,
    ) -> None:
        crops = [crop] if isinstance(crop, Crop) else list(crop or [])
        if (model is None) != (not crops):
            raise PenjingError(
                "A pipeline needs both a model and a crop that makes its input, or neither; "
                f"only the {'crop' if model is None else 'model'} was given."
            )
        if every < 1:
            raise PenjingError(f"every={every}: the detector runs every 1, 2, 3... frames.")
        self.detector, self.crops, self.every, self.motion = detector, crops, every, motion
        self.postprocess, self.enough = postprocess, enough
        self.threads = threads
        self.model = _callable(model, crops, threads)
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far, because the next one belongs to another video."""
        self._gate = Gate(self.motion) if self.motion is not None else None
        self._tracker = Tracker(flow=self.every > 1 or self._gate is not None)
        self._since = self.every
        self._moved = True
        self._shape: tuple[int, ...] | None = None
        self._last: list[Found] = []

    def __call__(self, frame: Frame) -> list[Found]:
        """Find the objects in the next ``frame``, uint8 RGB ``[H, W, 3]``, best first. If the gate sees
        no motion, they are those of the last frame; a frame of another size resets the pipeline.

        Raises:
            PenjingError: ``frame`` has another type or shape.
        """
        check(frame)
        if frame.shape != self._shape:
            self.reset()
            self._shape = frame.shape
        moves = self._gate is None or self._gate(frame)
        # Objects that moved and stopped since the last detection must still be detected.
        self._moved = self._moved or moves
        self._since += 1
        if self._moved and self._since >= self.every:
            self._moved, self._since = False, 0
            tracks = self._tracker.update(frame, self.detector(frame))
        elif moves:
            tracks = self._tracker.follow(frame)
        else:
            return list(self._last)
        outputs = self.view(frame, [track.box for track in tracks])
        found = [
            Found(tuple(track.box[:4].tolist()), float(track.box[4]), track.identity, output)
            for track, output in zip(tracks, outputs, strict=True)
        ]
        self._last = sorted(found, key=lambda item: -item.score)
        return list(self._last)

    def run(self, frames: Iterable[Frame]) -> Iterator[list[Found]]:
        """Yield the objects in each of ``frames``, which are those of one video."""
        self.reset()
        return map(self, frames)

    def view(self, frame: Frame, boxes: Sequence[NDArray[np.float32]]) -> list[Any]:
        """Return the model's output for each of ``boxes`` in ``frame``; crops of one shape are run
        together."""
        if self.model is None or not boxes:
            return [None] * len(boxes)
        outputs: list[list[Any]] = [[] for _ in boxes]
        waiting = list(range(len(boxes)))
        for crop in self.crops:
            cuts = [crop.cut(frame, boxes[index]) for index in waiting]
            for index, output in zip(waiting, self._results(cuts), strict=True):
                outputs[index].append(output)
            if self.enough is not None:
                waiting = [index for index in waiting if not self.enough(outputs[index][-1])]
        seen = outputs if len(self.crops) > 1 else [only for (only,) in outputs]
        return [self.postprocess(output) for output in seen] if self.postprocess else seen

    def _results(self, cuts: list[NDArray[np.float32]]) -> list[Any]:
        """Return one output for each cut, in order."""
        assert self.model is not None
        results: list[Any] = [None] * len(cuts)
        for shape in {cut.shape for cut in cuts}:
            places = [place for place, cut in enumerate(cuts) if cut.shape == shape]
            batch = self.model(np.concatenate([cuts[place] for place in places]))
            for place, output in zip(places, batch, strict=True):
                results[place] = output
        return results


class File:
    """An ONNX file as a function of a batch of crops.

    Attributes:
        content: bytes of the file on disk.
        packed: whether the file is a ``.penjing`` file.
    """

    def __init__(self, path: Path, crops: Sequence[Crop], threads: int) -> None:
        source = onnx_bytes(path, LARGEST_MODEL)
        self.packed = path.suffix == ".penjing"
        self.content = path.read_bytes() if self.packed else source
        self._session = runtime.session(source, threads)
        image, *more = self._session.get_inputs()
        outputs = self._session.get_outputs()
        if more or len(outputs) > 1 or len(image.shape) != 4 or image.type != "tensor(float)":
            raise PenjingError(
                f"{path} takes {image.type} {image.shape} and has {len(outputs)} outputs; a model "
                "behind a detector takes one image of float32 [N, C, H, W] and gives one output."
            )
        for crop in crops:
            _check_fit(path, image.shape, crop)
        self._input = image.name
        self._one_by_one = image.shape[0] == 1

    def __call__(self, crops: NDArray[np.float32]) -> NDArray:
        if self._one_by_one:
            return np.concatenate([self._run(crop[None]) for crop in crops])
        return self._run(crops)

    def _run(self, crops: NDArray[np.float32]) -> NDArray:
        return self._session.run(None, {self._input: crops})[0]


def _check_fit(path: Path, shape: list, crop: Crop) -> None:
    """Raise PenjingError if the file does not take images of ``crop``, before the first object."""
    made = (1, crop.channels, crop.height, crop.width)
    for wanted, given in zip(shape, made, strict=True):
        # A size that the file leaves open is a name.
        if isinstance(wanted, int) and given != wanted:
            raise PenjingError(
                f"{path} takes images {shape}, but the crop makes [N, {crop.channels}, {crop.height}, "
                f"{crop.width or 'its own width'}]; set the crop's height, width and channels."
            )


class Module:
    """A PyTorch module as a function of a batch of crops."""

    def __init__(self, module: nn.Module) -> None:
        import torch

        self.module = module.eval()
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def __call__(self, crops: NDArray[np.float32]) -> NDArray:
        import torch

        with torch.inference_mode():
            output = self.module(torch.from_numpy(crops).to(self._device))
        if not isinstance(output, torch.Tensor):
            raise PenjingError(
                f"The model {type(self.module).__name__} gives a {type(output).__name__}; a model "
                "behind a detector gives one tensor [N, ...]: wrap it in a module that does."
            )
        return output.cpu().numpy()


def _callable(
    model: nn.Module | str | Path | Model | None, crops: Sequence[Crop], threads: int
) -> Model | None:
    if isinstance(model, str | Path):
        return File(Path(model), crops, threads)
    if model is None or not hasattr(model, "state_dict"):
        return model  # type: ignore[return-value]
    return Module(model)  # type: ignore[arg-type]
