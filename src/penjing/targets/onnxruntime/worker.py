"""The process that runs files in ONNX Runtime for ``isolated``.

It imports the runtime and NumPy only, so that its memory is what a device needs, and a crash of the
runtime, a lack of memory or an endless run hits one job.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime as ort

from penjing.errors import PenjingError
from penjing.targets.onnxruntime import feeds, runtime
from penjing.targets.onnxruntime.messages import receive, send
from penjing.targets.timing import time_calls

Stream = IO[bytes]
Job = dict[str, Any]


def serve() -> None:
    """Fork a process for each job that the socket on standard input brings, until it is closed.

    A message with a file descriptor is a job: its process talks over that descriptor, and the reply
    is the process's number. A message with such a number ends that process: the reply is its exit
    code, negative for the signal that killed it.
    """
    np.random.default_rng()  # imports what every timing needs
    control = socket.socket(fileno=0)
    running: set[int] = set()
    try:
        while _served(control, running):
            pass
    finally:
        for pid in running:
            _end(pid)


def _served(control: socket.socket, running: set[int]) -> bool:
    """Reply to one message; False at the end of the stream."""
    message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
    if not message:
        return False
    if descriptors:
        reply = _fork(control, descriptors[0])
        running.add(reply)
    else:
        reply = _end(int(message))
        running.discard(int(message))
    control.send(str(reply).encode())
    return True


def work(reader: Stream, writer: Stream) -> None:
    """Do the job that ``reader`` brings and reply on ``writer``."""
    job, arrays = receive(reader)
    try:
        JOBS[job["kind"]](job, _opened(job, arrays), reader, writer)
    except PenjingError as error:
        send(writer, {"error": str(error)})
    except MemoryError:
        send(writer, {"error": f"There is not enough memory to run {_names(job)}."})


def work_alone() -> None:
    """Do one job over standard input and output."""
    with os.fdopen(os.dup(1), "wb") as writer:
        os.dup2(2, 1)  # keeps printed text out of the messages
        work(sys.stdin.buffer, writer)


def _fork(control: socket.socket, descriptor: int) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    try:
        control.close()
        _die_first()
        with os.fdopen(descriptor, "rb") as reader, os.fdopen(os.dup(descriptor), "wb") as writer:
            work(reader, writer)
        os._exit(0)
    finally:
        os._exit(1)


def _end(pid: int) -> int:
    # Without effect on a process that has ended: its number is free only after the wait.
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die_first() -> None:
    """Let Linux kill this process, not the one that waits for it, when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _opened(job: Job, arrays: list[np.ndarray]) -> list[_Opened]:
    contents = iter(arrays)
    return [_Opened(file, file["path"] or next(contents).tobytes(), job) for file in job["files"]]


class _Opened:
    """A file of a job, and the session that runs it."""

    def __init__(self, file: dict[str, Any], source: str | bytes, job: Job) -> None:
        self.name, self.shapes, self.source = file["name"], file["shapes"], source
        self.limit_s, self.threads = job["limit_s"], job["threads"]

    def load(self) -> ort.InferenceSession:
        with _at_most(self.limit_s):
            return runtime.session(self.source, self.threads, name=self.name)

    def call(self) -> Callable[[], object]:
        """Return a function that runs the file once on ``feeds.feeds``, after a first run."""
        opened = self.load()
        self.feeds = feeds.feeds(opened, self.shapes, self.name)
        run = feeds.runner(opened, self.feeds)
        with _at_most(self.limit_s), runtime.naming(self.name):
            run()
        return run


def _run(job: Job, files: list[_Opened], reader: Stream, writer: Stream) -> None:
    """Send the outputs of each batch until the stream ends."""
    (file,) = files
    opened = file.load()
    send(writer, {})
    while True:
        try:
            _, arrays = receive(reader)
        except EOFError:
            return
        with _at_most(file.limit_s), runtime.naming(file.name):
            found = opened.run(None, feeds.feed(opened, arrays[0], file.name))
        send(writer, {}, runtime.arrays(found, file.name))


def _time(job: Job, files: list[_Opened], reader: Stream, writer: Stream) -> None:
    # The timing itself needs no limit: it ends by its own settings once each file has run.
    calls = [file.call() for file in files]
    with runtime.naming(_names(job)):
        timed = time_calls(calls, **job["timing"])
    shapes = [{name: list(value.shape) for name, value in file.feeds.items()} for file in files]
    send(writer, {"timed": [asdict(row) for row in timed], "shapes": shapes})


def _names(job: Job) -> str:
    return ", ".join(file["name"] for file in job["files"])


def _peak(job: Job, files: list[_Opened], reader: Stream, writer: Stream) -> None:
    (file,) = files
    run = file.call()
    with _at_most(file.limit_s), runtime.naming(file.name):
        run(), run()
    send(writer, {"peak": _peak_bytes()})


def _optimize(job: Job, files: list[_Opened], reader: Stream, writer: Stream) -> None:
    """Write the runtime's optimized graph to the job's target."""
    (file,) = files
    with _at_most(file.limit_s):
        runtime.session(file.source, name=file.name, optimized=Path(job["target"]))
    send(writer, {})


JOBS: dict[str, Callable[[Job, list[_Opened], Stream, Stream], None]] = {
    "run": _run,
    "time": _time,
    "peak": _peak,
    "optimize": _optimize,
}


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM, even inside the runtime, if the block takes longer."""
    if math.isinf(seconds) or not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a new process starts with its parent's peak.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
