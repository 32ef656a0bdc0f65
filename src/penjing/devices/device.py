"""The interface of a device, on which files are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np

from penjing.targets.timing import Latency


class Device(Protocol):
    """A machine that runs and measures files."""

    @property
    def name(self) -> str:
        """Name of the processor, with the number of cores."""

    @property
    def threads(self) -> int:
        """Number of threads of the runtime."""

    def running(
        self, path: str | Path
    ) -> AbstractContextManager[Callable[[np.ndarray], list[np.ndarray]]]:
        """Load a file; the context gives a function from a batch ``[N, ...]`` to its outputs."""

    def latency(self, paths: Sequence[str | Path]) -> list[Latency]:
        """Measure the latency of every file of ``paths``, one image at a time, in turns."""

    def peak_rss(self, path: str | Path) -> int:
        """Measure the peak memory, in bytes, of a process that does nothing but run the file."""
