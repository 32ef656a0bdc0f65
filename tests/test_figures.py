"""RESULTS.md and the README's few figures are those that the results give."""

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


LAYOUT = {
    "questions": {"How long is it?": ["b"]},
    "highlights": [["Length of the first", "a", "a|b", "bytes"]],
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a README and the results of three benchmarks."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name in ("figures.py", "results.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / "benchmarks")
    (tmp_path / "benchmarks/figures.json").write_text(json.dumps(LAYOUT))
    (tmp_path / "README.md").write_text(README)
    no_peer = {**ROW, "work": "second", "ours": 7, "peer": None, "peer_name": None}
    no_goal = {**no_peer, "work": "third", "goal": None, "met": None}
    for name, row in (("b", {**no_peer, "goal": "at least 5"}), ("a", ROW), ("c", no_goal)):
        record = {"rows": [row], "command": f"python benchmarks/{name}.py", "cpu": "a CPU"}
        (tmp_path / f"benchmarks/results/{name}.json").write_text(json.dumps(record))
    return tmp_path


def figures(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repository / "benchmarks/figures.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_writes_the_chosen_figures_between_the_readmes_markers(repository: Path):
    assert figures(repository).returncode == 0
    text = (repository / "README.md").read_text()
    assert text.startswith("# x\n\n<!-- figures -->\n| what was measured |")
    assert text.endswith("<!-- /figures -->\n\nend | of it\n") and "old" not in text
    assert "| Length of the first | 12,346 | 0.0001234 (other) |" in text
    assert "second" not in text


def test_writes_all_figures_with_a_goal_by_question(repository: Path):
    assert figures(repository).returncode == 0
    text = (repository / "benchmarks/RESULTS.md").read_text()
    asked, others = text.index("## How long is it?"), text.index("## Other figures")
    second, first = (
        text.index("| second | bytes | 7 |  | at least 5 | yes |"),
        text.index(r"| a\|b |"),
    )
    assert asked < second < others < first
    assert "`python benchmarks/b.py` on a CPU" in text[asked:second]
    assert "third" not in text, "a figure without a goal is in its result file only"


def test_check_tells_stale_from_fresh_and_writes_nothing(repository: Path):
    stale = figures(repository, "--check")
    assert stale.returncode == 1 and "README.md is stale" in stale.stderr
    assert (repository / "README.md").read_text() == README
    assert not (repository / "benchmarks/RESULTS.md").exists()
    figures(repository)
    assert figures(repository, "--check").returncode == 0
    (repository / "benchmarks/RESULTS.md").write_text("by hand")
    assert "RESULTS.md is stale" in figures(repository, "--check").stderr


def test_a_chosen_figure_that_no_result_has_is_told(repository: Path):
    layout = {**LAYOUT, "highlights": [["Length", "a", "a|b", "metres"]]}
    (repository / "benchmarks/figures.json").write_text(json.dumps(layout))
    failed = figures(repository)
    assert failed.returncode != 0 and "results/a.json has no row" in failed.stderr


def test_a_readme_without_markers_is_refused(repository: Path):
    (repository / "README.md").write_text("# nothing\n")
    failed = figures(repository)
    assert failed.returncode != 0 and "<!-- figures -->" in failed.stderr
