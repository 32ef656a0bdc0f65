"""The command line in a process of its own that has all modules already: importing takes seconds."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

SERVER = get_context("forkserver")
"""Forks of it can train; those of a process in which autograd has started threads cannot."""
SERVER.set_forkserver_preload(
    [
        "command_line",
        "penjing.cli.main",
        "penjing.exploration",
        "penjing.report",
        "penjing.training",
    ]
)


def penjing(*arguments: object, env: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """Run ``penjing`` with ``arguments`` and wait for its end."""
    words = ["penjing", *map(str, arguments)]
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = SERVER.Process(target=_run, args=(words, {**os.environ, **(env or {})}, out, err))
        process.start()
        process.join()
        assert process.exitcode is not None
        return CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    from penjing.cli import main

    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    try:
        main.main()
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without
