"""Run each measured file in a process of its own, forked by a server process.

A crash of the runtime, a lack of memory or an endless run is then an error of one job. The server has
imported the runtime once; it is started with the first job, started again when it died, and ends with
penjing, also when that is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from penjing.errors import PenjingError
from penjing.targets.onnxruntime.messages import receive, send

Source = str | Path | bytes
"""A ``.onnx`` file, or its bytes."""

FORKS = sys.platform == "linux"
"""Whether jobs are forked; elsewhere each starts a process, because macOS's libraries must not run
after a fork."""
ROOT = Path(__file__).parents[3]
_limit: ContextVar[float] = ContextVar("limit", default=600.0)


@dataclass(frozen=True)
class File:
    """A file that a job runs, the ``name`` that errors show, and the ``shapes`` of inputs by name."""

    source: Source
    name: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shown = "the exported graph" if isinstance(self.source, bytes) else str(self.source)
        object.__setattr__(self, "name", self.name or shown)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Let one step of a job take at most ``seconds`` (600 otherwise): loading a file, running one
    batch. A job that takes longer is ended and raises a PenjingError."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def do(
    kind: str, files: Sequence[File], *, threads: int = 1, fresh: bool = False, **settings: Any
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Run a job and return its reply.

    Args:
        kind: key of ``worker.JOBS``.
        fresh: start a process instead of forking it, so that all pages of its libraries count, as on
            a device.
        settings: settings of the job, as JSON.

    Raises:
        PenjingError: the runtime cannot load or run a file, dies of it, or takes too long.
    """
    with _job(kind, files, threads, fresh=fresh, **settings) as job:
        return job.reply()


@contextlib.contextmanager
def running(file: File, threads: int = 1) -> Iterator[Callable[[np.ndarray], list[np.ndarray]]]:
    """Load ``file``; the context gives a function from a batch float32 ``[N, C, H, W]`` to its outputs.

    Raises:
        PenjingError: as in ``do``; the function raises it too.
    """
    with _job("run", [file], threads) as job:
        job.reply()

        def outputs_of(batch: np.ndarray) -> list[np.ndarray]:
            job.ask({}, [np.asarray(batch)])
            return job.reply()[1]

        yield outputs_of


@contextlib.contextmanager
def _job(
    kind: str, files: Sequence[File], threads: int, *, fresh: bool = False, **settings: Any
) -> Iterator[_Job]:
    header = {"kind": kind, "threads": threads, "limit_s": _limit.get(), **settings}
    header["files"] = [{"path": _path(f), "name": f.name, "shapes": f.shapes} for f in files]
    contents = [np.frombuffer(f.source, np.uint8) for f in files if isinstance(f.source, bytes)]
    job = _Job(_Alone() if fresh or not FORKS else _Forked(), header)
    try:
        job.ask(header, contents)
        yield job
    finally:
        job.process.end()


def _path(file: File) -> str | None:
    return None if isinstance(file.source, bytes) else str(Path(file.source).absolute())


class _Job:
    """Connection to the process of one job."""

    def __init__(self, process: _Forked | _Alone, header: dict[str, Any]) -> None:
        self.process, self.limit_s = process, header["limit_s"]
        self.names = ", ".join(file["name"] for file in header["files"])

    def ask(self, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        try:
            send(self.process.writer, header, arrays)
        except OSError as error:
            raise self.death() from error

    def reply(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            header, arrays = receive(self.process.reader)
        except (EOFError, OSError) as error:
            raise self.death() from error
        if "error" in header:
            raise PenjingError(header["error"])
        return header, arrays

    def death(self) -> PenjingError:
        """Make the error of a process that ended without a reply."""
        code = self.process.end()
        if code is None or code >= 0:
            return PenjingError(
                f"The process in which ONNX Runtime ran {self.names} ended unexpectedly"
                f"{'' if code is None else f' with code {code}'}; run it again."
            )
        if code == -signal.SIGALRM:
            return PenjingError(
                f"ONNX Runtime took more than {self.limit_s:g} s for one step of {self.names} "
                "(loading a file, running one batch) and was stopped; take a smaller model or batch."
            )
        name = (signal.strsignal(-code) or "unknown").lower()
        hint = "; memory may have run out" if code == -signal.SIGKILL else ""
        return PenjingError(
            f"ONNX Runtime was killed by signal {-code} ({name}) while it ran {self.names}{hint}; "
            "other files can still be measured."
        )


class _Forked:
    """A process forked for one job."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.server, self.pid = _kept.fork(theirs)
        self.reader: IO[bytes] = ours.makefile("rb")
        self.writer: IO[bytes] = ours.makefile("wb")
        ours.close()
        self.code: int | None = None
        self.ended = False

    def end(self) -> int | None:
        """End the process; returns its exit code, None if it is unknown."""
        if not self.ended:
            self.ended = True
            _close(self.reader, self.writer)
            self.code = _kept.end(self.server, self.pid)
        return self.code


class _Alone:
    """A process started for one job."""

    def __init__(self) -> None:
        self.process = _start("work_alone", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.reader, self.writer = self.process.stdout, self.process.stdin

    def end(self) -> int:
        """Kill the process; returns its exit code."""
        self.process.kill()
        _close(self.reader, self.writer)
        return self.process.wait()


class _Server:
    """The server process, which forks the others."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = _start("serve", stdin=theirs, stdout=subprocess.DEVNULL)

    def ask(self, message: bytes, descriptors: Sequence[int] = ()) -> int:
        """Send ``message``; returns the number in the reply.

        Raises:
            OSError: the process has ended.
        """
        socket.send_fds(self.control, [message], descriptors)
        reply = self.control.recv(64)
        if not reply:
            raise ConnectionResetError("the measuring process has ended")
        return int(reply)

    def close(self) -> None:
        """End the process by closing its socket."""
        self.control.close()
        self.process.wait()


class _Kept:
    """The one server process, and the lock that its connection needs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: _Server | None = None

    def fork(self, connection: socket.socket) -> tuple[_Server, int]:
        """Fork a process for a job over ``connection``; returns its server and its number."""
        with self.lock:
            for _ in range(2):
                self.server = self.server or _Server()
                reply = self._ask(self.server, b"job", [connection.fileno()])
                if reply is not None:
                    return self.server, reply
        raise PenjingError(
            "the process in which ONNX Runtime measures does not start; check that "
            f"{sys.executable} -I -c 'import onnxruntime' works and that memory is left."
        )

    def end(self, server: _Server, pid: int) -> int | None:
        """End a process that ``server`` forked; returns its exit code, None if ``server`` has died."""
        with self.lock:
            return self._ask(server, str(pid).encode()) if server is self.server else None

    def close(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            server.close()

    def _ask(self, server: _Server, message: bytes, descriptors: Sequence[int] = ()) -> int | None:
        try:
            return server.ask(message, descriptors)
        except OSError:
            self.close()
            return None
        except BaseException:  # such as Ctrl-C: the next message would get this one's reply
            self.close()
            raise

    def forget(self) -> None:
        """Drop the server in a fork of penjing's own process: it is the parent's."""
        self.lock = threading.Lock()
        if self.server is not None:
            self.server.control.close()
            self.server = None


_kept = _Kept()
atexit.register(_kept.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.forget)


def _start(function: str, **streams: Any) -> subprocess.Popen[bytes]:
    """Run a function of ``worker`` in a new Python, out of reach of Ctrl-C.

    Only the function's module is run, not the user's own ``__main__``. Packages are found on this
    process's path, after those that Python finds by itself.
    """
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.path.extend(sys.argv[2:]); "
        f"from penjing.targets.onnxruntime.worker import {function}; {function}()"
    )
    paths = [path for path in sys.path if path]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program, str(ROOT), *paths],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Threads of NumPy would not be there after a fork.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        **streams,
    )


def _close(*streams: IO[bytes]) -> None:
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.close()
