"""Where files run that are measured: each job in a process of its own, forked by one that stays.

A crash of the runtime, all memory taken or no end is then an error of one job. The process that
stays has imported the runtime once; it is started with the first job, started again when it died,
and ends with penjing, also when that is killed.
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
"""Elsewhere every job starts a process: macOS forbids what its libraries do after a fork."""
ROOT = Path(__file__).parents[3]
_limit: ContextVar[float] = ContextVar("limit", default=600.0)


@dataclass(frozen=True)
class File:
    """What a job runs: ``name`` is shown in errors, ``shapes`` are those of inputs by name."""

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
    """The answer to a job that has one.

    Args:
        kind: of ``worker.JOBS``.
        fresh: not forked: the process then has all pages of its libraries, as on a device.
        settings: of the job, in JSON.

    Raises:
        PenjingError: the runtime cannot load or run a file, dies of it, or takes too long.
    """
    with _job(kind, files, threads, fresh=fresh, **settings) as job:
        return job.answer()


@contextlib.contextmanager
def running(file: File, threads: int = 1) -> Iterator[Callable[[np.ndarray], list[np.ndarray]]]:
    """A function that gives the outputs of ``file`` for one batch, float32 ``[N, C, H, W]``.

    Raises:
        PenjingError: as in ``do``; the function raises it too.
    """
    with _job("run", [file], threads) as job:
        job.answer()

        def outputs_of(batch: np.ndarray) -> list[np.ndarray]:
            job.ask({}, [np.asarray(batch)])
            return job.answer()[1]

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
    """The conversation with the process of one job."""

    def __init__(self, process: _Forked | _Alone, header: dict[str, Any]) -> None:
        self.process, self.limit_s = process, header["limit_s"]
        self.names = ", ".join(file["name"] for file in header["files"])

    def ask(self, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        try:
            send(self.process.writer, header, arrays)
        except OSError as error:
            raise self.death() from error

    def answer(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            header, arrays = receive(self.process.reader)
        except (EOFError, OSError) as error:
            raise self.death() from error
        if "error" in header:
            raise PenjingError(header["error"])
        return header, arrays

    def death(self) -> PenjingError:
        """Why there is no answer."""
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
        """Its exit code, None where nobody knows."""
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
        """Its exit code."""
        self.process.kill()
        _close(self.reader, self.writer)
        return self.process.wait()


class _Server:
    """The process that stays."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = _start("serve", stdin=theirs, stdout=subprocess.DEVNULL)

    def ask(self, message: bytes, descriptors: Sequence[int] = ()) -> int:
        """The number that answers ``message``.

        Raises:
            OSError: the process is not there any more.
        """
        socket.send_fds(self.control, [message], descriptors)
        answer = self.control.recv(64)
        if not answer:
            raise ConnectionResetError("the measuring process has ended")
        return int(answer)

    def close(self) -> None:
        """End it: it sees the end of its socket."""
        self.control.close()
        self.process.wait()


class _Kept:
    """The one process that stays, and the lock that its conversation needs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: _Server | None = None

    def fork(self, connection: socket.socket) -> tuple[_Server, int]:
        """A process for one job that talks over ``connection``, and who forked it."""
        with self.lock:
            for _ in range(2):
                self.server = self.server or _Server()
                answer = self._ask(self.server, b"job", [connection.fileno()])
                if answer is not None:
                    return self.server, answer
        raise PenjingError(
            "the process in which ONNX Runtime measures does not start; check that "
            f"{sys.executable} -I -c 'import onnxruntime' works and that memory is left."
        )

    def end(self, server: _Server, pid: int) -> int | None:
        """The exit code of a process that ``server`` forked, None where ``server`` has died."""
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
        except BaseException:  # such as Ctrl-C: the answer would be taken for that of the next
            self.close()
            raise

    def forget(self) -> None:
        """In a fork of penjing's own process: the process that stays is the parent's."""
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

    Only the function's module is run: nothing of what the user's own ``__main__`` does. Packages are
    found where they are here, after those that Python finds by itself.
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
