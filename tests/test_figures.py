"""The README's table of figures is the one that the results give."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
README = "# x\n\n<!-- figures -->\nold\n<!-- /figures -->\n\nend | of it\n"
ROW = {
    "work": "a|b",
    "measure": "bytes",
    "ours": 12345.678,
    "peer": 0.00012345,
    "peer_name": "other",
    "goal": "less",
    "met": True,
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a README and the results of three benchmarks."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name in ("figures.py", "results.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / "benchmarks")
    (tmp_path / "README.md").write_text(README)
    no_peer = {**ROW, "work": "second", "ours": 7, "peer": None, "peer_name": None}
    no_goal = {**no_peer, "work": "third", "goal": None, "met": None}
    for name, row in (("b", {**no_peer, "goal": "at least 5"}), ("a", ROW), ("c", no_goal)):
        (tmp_path / f"benchmarks/results/{name}.json").write_text(json.dumps({"rows": [row]}))
    return tmp_path


def figures(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repository / "benchmarks/figures.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_writes_the_table_between_the_markers(repository: Path):
    assert figures(repository).returncode == 0
    text = (repository / "README.md").read_text()
    assert text.startswith("# x\n\n<!-- figures -->\n| work |")
    assert text.endswith("<!-- /figures -->\n\nend | of it\n") and "old" not in text
    first, second = text.index(r"| a\|b | bytes | 12,346 | 0.0001234"), text.index("| second |")
    assert first < second
    assert "| second | bytes | 7 |  | at least 5 | yes |" in text
    assert "third" not in text, "a figure without a goal is in its result file only"


def test_check_tells_stale_from_fresh_and_writes_nothing(repository: Path):
    stale = figures(repository, "--check")
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert (repository / "README.md").read_text() == README
    figures(repository)
    assert figures(repository, "--check").returncode == 0


def test_a_readme_without_markers_is_refused(repository: Path):
    (repository / "README.md").write_text("# nothing\n")
    failed = figures(repository)
    assert failed.returncode != 0 and "<!-- figures -->" in failed.stderr
