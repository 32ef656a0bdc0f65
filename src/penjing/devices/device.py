"""What a machine has to be able to do, so that figures can be measured on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np

from penjing.targets.timing import Latency


class Device(Protocol):
    """A machine on which files run; every figure of a file comes from one."""

    @property
    def name(self) -> str:
        """The processor's name, with the number of cores seen."""

    @property
    def threads(self) -> int:
        """Threads of the runtime."""

    def running(
        self, path: str | Path
    ) -> AbstractContextManager[Callable[[np.ndarray], list[np.ndarray]]]:
        """Load the file; the context gives a function from a batch ``[N, ...]`` to its outputs."""

    def latency(self, paths: Sequence[str | Path]) -> list[Latency]:
        """Time every file of ``paths``, one image at a time, in turns."""

    def peak_rss(self, path: str | Path) -> int:
        """Peak resident memory, in bytes, of a process that does nothing but run the file."""
