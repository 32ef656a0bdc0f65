"""The device that penjing runs on, with ONNX Runtime."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penjing.targets.onnxruntime import isolated
from penjing.targets.onnxruntime.isolated import File
from penjing.targets.timing import SETTLED, Latency


@dataclass(frozen=True)
class Local:
    """The CPU of this machine; files run in a process of their own.

    Attributes:
        threads: number of threads of the runtime.
    """

    threads: int = 1

    @property
    def name(self) -> str:
        """Name of the processor as the system gives it, with the number of cores."""
        name = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            lines = info.read_text().splitlines()
            names = [line for line in lines if line.startswith("model name")]
            name = names[0].partition(":")[2].strip() if names else name
        return f"{name}, {os.cpu_count()} cores"

    def running(
        self, path: str | Path
    ) -> AbstractContextManager[Callable[[np.ndarray], list[np.ndarray]]]:
        """Load a file; the context gives a function from a batch ``[N, ...]`` to its outputs.

        Raises:
            PenjingError: ONNX Runtime cannot load or run the file, or dies of it.
        """
        return isolated.running(File(path), self.threads)

    def latency(
        self,
        paths: Sequence[str | Path],
        *,
        runs: int = 300,
        warmup: int = 10,
        seconds: float = 10.0,
        settled: float = SETTLED,
    ) -> list[Latency]:
        """Measure the latency of every file of ``paths``, one image at a time.

        The files take turns run by run, in an order that changes each time, so that a change in the
        machine's load or clock, and the caches that another file leaves, affect all of them alike.
        There are at most ``runs`` runs of each: they end when the medians of all files are known to
        1 % (``settled``; not before the twentieth run), or when ``seconds`` are over.
        """
        timing = {"runs": runs, "warmup": warmup, "seconds": seconds, "settled": settled}
        return self.timed([File(path) for path in paths], timing)[0]

    def peak_rss(self, path: str | Path) -> int:
        """Measure the peak memory, in bytes, of a process that does nothing but run ``path``."""
        return self.peak(File(path))

    def timed(
        self, files: Sequence[File], timing: dict[str, Any]
    ) -> tuple[list[Latency], list[dict[str, list[int]]]]:
        """Measure the latencies of ``files``; returns the shapes of their inputs by name, too.
        ``timing`` holds arguments of ``time_calls``."""
        reply, _ = isolated.do("time", files, threads=self.threads, timing=timing)
        return [Latency(**row) for row in reply["timed"]], reply["shapes"]

    def peak(self, file: File) -> int:
        """Measure the peak memory, in bytes, as ``peak_rss`` does, of a file with given shapes."""
        reply, _ = isolated.do("peak", [file], threads=self.threads, fresh=True)
        return int(reply["peak"])


HERE = Local()
"""Default device: this machine, with one thread."""
