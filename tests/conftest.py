"""One thread a test: tests run side by side, and threads that wait for a core burn the others'."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from penjing import files


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, which is all that waiting for the disk guards against."""
    monkeypatch.setattr(files, "_flush_one", lambda path: None)


def pytest_configure(config: pytest.Config) -> None:
    """Hand out tests one by one, which shares them out evenly."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"
