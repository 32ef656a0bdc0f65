"""How commands end: exit codes, and what a user reads, whatever happened inside."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from safetensors import SafetensorError

from penjing.cli import endings
from penjing.cli.endings import resumable
from penjing.errors import PenjingError


def raising(error: BaseException) -> Callable[[], None]:
    def app() -> None:
        raise error

    return app


def ended(app: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code and what was written on standard error."""
    with pytest.raises(SystemExit) as end:
        endings.run(app)
    return end.value.code, capsys.readouterr().err


def test_what_a_user_can_put_right_is_a_sentence(capsys) -> None:
    assert ended(raising(PenjingError("give --root")), capsys) == (2, "penjing: give --root\n")


def test_ctrl_c_says_whether_the_command_resumes(capsys) -> None:
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "penjing: stopped\n")
    code, said = ended(resumable(raising(KeyboardInterrupt())), capsys)
    assert (code, said) == (130, "penjing: stopped; the same command resumes\n")


def test_a_fault_is_one_line_and_a_traceback_only_if_asked(capsys, monkeypatch) -> None:
    monkeypatch.delenv(endings.DEBUG, raising=False)
    code, said = ended(raising(KeyError("two\nlines")), capsys)
    assert code == 1
    assert said.count("\n") == 1
    assert all(word in said for word in ("KeyError", "two\\nlines", "report", "--debug"))
    monkeypatch.setenv(endings.DEBUG, "1")
    code, said = ended(raising(KeyError("two")), capsys)
    assert code == 1
    assert "Traceback" in said
    assert "in app" in said


def test_a_full_disk_is_a_sentence_with_the_file(capsys) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "study/model.onnx")
    code, said = ended(raising(error), capsys)
    assert code == 2
    assert "disk is full (study/model.onnx)" in said


def test_a_full_disk_is_seen_behind_another_error(capsys) -> None:
    def app() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the study could not be written") from error

    code, said = ended(app, capsys)
    assert code == 2
    assert "disk is full" in said


def test_a_full_disk_is_seen_in_what_safetensors_says(capsys) -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    code, sentence = ended(raising(SafetensorError(said)), capsys)
    assert code == 2
    assert "disk is full" in sentence


def test_a_reader_that_goes_away_is_no_fault() -> None:
    """As in ``penjing recipes | head -c 1``: 0.1 MB are more than a pipe holds."""
    code = (
        "from penjing.cli import endings, main\n"
        "@main.app.command()\n"
        "def flood():\n    print('x' * 100_000)\n    print('y' * 100_000)\n"
        "main.main()\n"
    )
    command = [sys.executable, "-c", code, "flood"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_short_answer_that_nobody_reads_is_no_fault() -> None:
    command = [sys.executable, "-m", "penjing.cli", "recipes"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
