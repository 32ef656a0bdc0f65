import os
import random
import re
import resource
import signal
from itertools import count
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penjing import files
from penjing.errors import PenjingError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    files.write_bytes(path, b"more")
    assert path.read_bytes() == b"more"
    assert names(path.parent) == ["a.txt"]


def test_a_block_that_raises_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), files.atomic(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_one(tmp_path):
    path = tmp_path / "best"
    for content in ("first", "second"):
        with files.atomic(path) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
        assert names(path) == [content]
    assert names(tmp_path) == ["best"]


def test_another_writer_is_faster_again_and_again(tmp_path, monkeypatch):
    path, move, others = tmp_path / "best", Path.replace, iter("bcd")

    def put_another(source: Path, target: Path) -> Path:
        moved = move(source, target)
        if source == path and (name := next(others, None)):
            path.mkdir()
            (path / name).write_text(name)
        return moved

    path.mkdir()
    (path / "a").write_text("a")
    monkeypatch.setattr(Path, "replace", put_another)
    with files.atomic(path) as partial:
        partial.mkdir()
        (partial / "own").write_text("own")
    assert next(others, None) is None
    assert names(path) == ["own"] and names(tmp_path) == ["best"]


def test_tensors_of_any_layout(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    parts = {"a": whole, "b": whole.T, "c": whole[1]}
    files.save_tensors(tmp_path / "t", parts)
    found = load_file(tmp_path / "t")
    assert all(torch.equal(found[name], value) for name, value in parts.items())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PenjingError, match="cannot be written: File exists; choose a place"):
        files.write_text(tmp_path / "file" / "a", "text")


def test_only_abandoned_parts_are_deleted(tmp_path):
    gone = fork(int)
    gone.join()
    old, young, running, other = (
        tmp_path / name
        for name in (
            f".a.{gone.pid}-00.partial",
            f".a.{gone.pid}-11.partial",
            f".a.{os.getpid()}-22.partial",
            f".b.{gone.pid}-33.partial",
        )
    )
    for path in (old, young, running, other):
        path.write_text("")
        os.utime(path, (0, 0) if path != young else None)
    files.write_text(tmp_path / "a", "")
    assert names(tmp_path) == sorted(["a", *(path.name for path in (young, running, other))])


def fork(target, *args) -> BaseProcess:
    """A process that has all modules already, where starting one anew takes seconds."""
    process = get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def fill(path: Path, kind: str) -> None:
    # A limit on the size of files stands for the full disk: it takes no rights to set.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    message = f"{path} cannot be written: File too large; free some space on the disk."
    with pytest.raises(PenjingError, match=f"^{re.escape(message)}$"):
        if kind == "tensors":
            files.save_tensors(path, {"a": torch.zeros(100_000)})
        else:
            files.write_bytes(path, bytes(400_000))


@pytest.mark.parametrize("kind", ["tensors", "bytes"])
def test_a_full_disk_is_one_sentence(tmp_path, kind):
    (tmp_path / "a").write_text("old")
    process = fork(fill, tmp_path / "a", kind)
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def write_on(folder: Path, name: str) -> None:
    for number in count():
        text = f"{name} {number}\n" * 2000
        files.write_text(folder / "file", text)
        with files.atomic(folder / "folder") as partial:
            partial.mkdir()
            (partial / "a").write_text(text)
            (partial / "b").write_text(text)


def whole(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) == 2000 and len(set(lines)) == 1


def test_kills_and_two_writers_leave_whole_files(tmp_path):
    chance = random.Random(0)
    for _ in range(25):
        writers = [fork(write_on, tmp_path, name) for name in "ab"]
        for process in writers:
            process.join(chance.uniform(0.0, 0.04))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        if (tmp_path / "file").exists():
            assert whole((tmp_path / "file").read_text())
        folder = tmp_path / "folder"
        if folder.exists():
            assert whole((folder / "a").read_text())
            assert (folder / "a").read_text() == (folder / "b").read_text()
    assert (tmp_path / "file").exists()
