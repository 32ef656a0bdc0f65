"""Atomic writing of files and folders: each is there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from penjing.errors import PenjingError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)
ABANDONED_S = 3600.0
"""Age from which a partial file is deleted whose process does not run here; younger ones may belong
to another machine."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file, or make a folder, at; at the end of the block it is
    flushed to the disk and replaces ``path``.

    Before, and when the block raises or the process is killed, ``path`` is as it was. Several
    processes may write one path: the last one wins, as a whole. The folder of ``path`` is made if it
    is missing. What killed processes left beside ``path`` is deleted an hour later.

    Raises:
        PenjingError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    partial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(path)
        yield partial
        _flush(partial)
        _put(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        _delete(partial)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``, atomically. Raises what ``atomic`` raises."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, atomically. Raises what ``atomic`` raises."""
    write_bytes(path, text.encode())


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path`` as safetensors, atomically. Raises what ``atomic`` raises.

    Tensors may be on any device, strided, and share memory.
    """
    # Imported here because writing other files needs no PyTorch.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Cloned, because the format has no place for tensors that share memory.
    apart = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic(path) as partial:
        try:
            save_file(apart, partial, dict(metadata or {}))
        except SafetensorError as error:
            raise _as_system_error(error) from error


def remove(path: str | Path) -> None:
    """Delete a file or folder, if it exists, atomically. Raises PenjingError if it cannot be."""
    path = Path(path)
    aside = _beside(path)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(path, error) from error
    _delete(aside)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or one of its causes, means that the disk is full; libraries in other
    languages say so in words only."""
    words = [os.strerror(number) for number in FULL]
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _put(partial: Path, path: Path) -> None:
    while not _renamed(partial, path):
        # A folder that is not empty cannot be replaced: it is moved aside first.
        former = _beside(path)
        with suppress(FileNotFoundError):  # Another process was faster.
            path.replace(former)
        _delete(former)
    _flush_one(path.parent)


def _renamed(partial: Path, path: Path) -> bool:
    """Rename ``partial`` to ``path``; False if a folder there is not empty."""
    try:
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _beside(path: Path) -> Path:
    """Return a new path beside ``path`` whose name holds the number of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def _flush(path: Path) -> None:
    """Flush ``path``, with all that is in it, to the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            _flush(inner)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # Other systems do not open folders.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _delete_abandoned(path: Path) -> None:
    for found in path.parent.glob(f".{_literal(path.name)}.*-*{PARTIAL}"):
        number = found.name.removeprefix(f".{path.name}.").partition("-")[0]
        if number.isdigit() and not _runs(int(number)) and _age_s(found) > ABANDONED_S:
            _delete(found)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _as_system_error(error: Exception) -> OSError:
    """Make an OSError of a safetensors error, which has the system's number in its text only."""
    named = re.search(r"os error (\d+)", str(error))
    number = int(named[1]) if named else errno.EIO
    return OSError(number, os.strerror(number) if named else " ".join(str(error).split()))


def _unwritable(path: Path, error: OSError) -> PenjingError:
    full = error.errno in (*FULL, errno.EFBIG)
    advice = "free some space on the disk" if full else "choose a place that can be written"
    return PenjingError(f"{path} cannot be written: {error.strerror or error}; {advice}.")
