"""``pack`` and ``unpack``: files in, files out."""

from __future__ import annotations

from pathlib import Path

from penjing.container import format
from penjing.container.damage import DamageError
from penjing.container.streams import Coder
from penjing.errors import PenjingError
from penjing.files import write_bytes


def pack(source: Path | str, target: Path | str, coder: Coder = "arithmetic") -> int:
    """Write the ONNX file ``source`` to ``target`` in the .penjing format.

    ``coder`` is the entropy coder of the weights: ``arithmetic`` gives the smaller file,
    ``huffman`` the classic code of Deep Compression (Han et al., 2016). The file is never larger
    than ``xz -9`` of ``source``. Returns the bytes written.

    Raises:
        PenjingError: ``source`` cannot be read, is no ONNX model, or keeps weights in other files;
            ``target`` is ``source``, or cannot be written.
    """
    if coder not in ("arithmetic", "huffman"):
        raise PenjingError(f"coder must be 'arithmetic' or 'huffman', not {coder!r}")
    _reject_same(source, target)
    data = read(source)
    if not data:
        raise PenjingError(f"{source} is empty, expected an ONNX model; export it again")
    try:
        packed = format.encode(data, coder)
    except DamageError as problem:
        raise PenjingError(f"{source} cannot be packed as an ONNX model: {problem}") from problem
    write_bytes(target, packed)
    return len(packed)


def unpack(source: Path | str, target: Path | str, *, most: int = format.LARGEST) -> None:
    """Write the ONNX file that was packed in ``source`` to ``target``, bit for bit.

    Time and memory follow the size that ``source`` declares, which a few bytes can make 2 GiB:
    ``most`` is the bytes that the ONNX file may have, for files of unknown origin.

    Raises:
        PenjingError: ``target`` is ``source``, or ``source`` cannot be read, is damaged or declares more
            than ``most`` bytes; ``target`` is then not touched.
    """
    _reject_same(source, target)
    data = read(source)
    try:
        model = _decode(data, most)
    except (DamageError, MemoryError) as problem:
        raise damaged(source, "unpacked", problem) from problem
    write_bytes(target, model)


def _reject_same(source: Path | str, target: Path | str) -> None:
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise PenjingError(f"{target} is the file to read; give another file to write")


def read(source: Path | str) -> bytes:
    """The bytes of ``source``; raises PenjingError with the system's reason if it has none."""
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise PenjingError(f"{source} cannot be read: {error.strerror}") from error


def damaged(source: Path | str, done: str, problem: Exception) -> PenjingError:
    """The error for the user where ``source`` could not be ``done`` because of ``problem``."""
    if isinstance(problem, MemoryError):
        return PenjingError(
            f"{source} cannot be {done}: it declares more bytes than there is memory for; "
            "copy it again, or use a machine with more memory"
        )
    return PenjingError(
        f"{source} cannot be {done}: {problem}; copy it again or pack the model again"
    )


def _decode(data: bytes, most: int) -> bytes:
    container = format.decode(data, most)
    model = container.model()
    if not container.matches(model):
        raise DamageError("what it holds does not fit its checksum")
    return model
