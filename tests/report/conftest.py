from pathlib import Path
from typing import Any

import pytest
import synthetic

from penjing import report


@pytest.fixture
def study() -> dict[str, Any]:
    return synthetic.study()


@pytest.fixture
def page(tmp_path: Path):
    """A function that writes a study and returns its report's HTML."""

    def made(record: dict[str, Any]) -> str:
        folder = synthetic.write(record, tmp_path / "study")
        report.write(folder, folder / "report.html")
        return (folder / "report.html").read_text(encoding="utf-8")

    return made
