"""Compare a deployed file with the original's file, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from penjing.devices import measurement
from penjing.tasks import Task, interval
from penjing.tasks.interval import Comparison

AGREEMENT_IMAGES = 1024
"""Number of images on which the classes of a model that was not trained are compared with the
original's; training images are added to a smaller split."""


class Original:
    """The original's file, with which other files are timed in turns and compared.

    Args:
        path: file of the original, ``model.onnx``.
        form: an output of the model it was made of, see ``measurement.outputs``.
    """

    def __init__(self, path: Path, task: Task, form: Any) -> None:
        self.path, self.task, self.form = path, task, form
        self._known: dict[tuple[str, int | None], tuple[Any, Tensor]] = {}

    def compared(self, path: Path, split: str, *, trained: bool) -> Comparison:
        """Compare the file at ``path`` with the original on the images of ``split``; if it was not
        ``trained`` on labels, agreement is measured on training images, too."""
        return self.compared_outputs(path, split, self._run(path, split, None), trained=trained)

    def compared_outputs(
        self, path: Path, split: str, found: tuple[Any, Tensor], *, trained: bool
    ) -> Comparison:
        """Compare as ``compared`` does, given the file's outputs for ``split``, and the targets."""
        expected, _ = self._outputs(split, None)
        comparison = interval.compare(self.task, expected, *found)
        missing = AGREEMENT_IMAGES - (comparison.images or 0)
        if trained or comparison.agreement is None or missing <= 0:
            return comparison
        others, _ = self._outputs("train", missing)
        output, _ = self._run(path, "train", missing)
        return comparison.and_agreement(interval.agreements(self.task, others, output))

    def outputs(self, path: Path, split: str) -> tuple[Any, Any, Tensor]:
        """The outputs of the original, and of the file at ``path``, for ``split``, and the targets."""
        return (self._outputs(split, None)[0], *self._run(path, split, None))

    def _outputs(self, split: str, limit: int | None) -> tuple[Any, Tensor]:
        if (split, limit) not in self._known:
            self._known[split, limit] = self._run(self.path, split, limit)
        return self._known[split, limit]

    def _run(self, path: Path, split: str, limit: int | None) -> tuple[Any, Tensor]:
        return measurement.outputs(path, self.task, split, limit, form=self.form)
