"""The technique that CONTRIBUTING.md shows works when it is put where it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TECHNIQUE = "src/penjing/techniques/powers_of_two.py"
TEST = "tests/techniques/test_powers_of_two.py"
BLOCK = re.compile(r"<!-- (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
CONFTEST = """
import penjing.techniques

penjing.techniques.__path__.append({folder!r})
"""
RECIPE_TEST = """
from pathlib import Path

from penjing import recipe


def test_the_recipe_is_read():
    names = [technique.name for technique in recipe.load(Path("small.yaml")).techniques]
    assert names == ["prune_channels", "powers_of_two"]
"""


@pytest.fixture
def blocks() -> dict[str, str]:
    return dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))


def test_it_works_where_it_says(blocks, tmp_path: Path):
    """In a process of its own: a technique, once imported, is known until the process ends."""
    (tmp_path / "techniques").mkdir()
    for place in (TECHNIQUE, TEST):
        folder = tmp_path / "techniques" if place == TECHNIQUE else tmp_path
        (folder / Path(place).name).write_text(blocks[place], encoding="utf-8")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(folder=str(tmp_path / "techniques")))
    (tmp_path / "small.yaml").write_text(blocks["recipe"])
    (tmp_path / "test_recipe.py").write_text(RECIPE_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.parametrize("place", [TECHNIQUE, TEST])
@pytest.mark.parametrize("rule", ["check", "format --check"])
def test_it_is_written_as_the_rest_is(blocks, place, rule):
    ours = [
        "--config",
        'lint.isort.known-first-party = ["penjing"]',
        "--stdin-filename",
        place,
        "-",
    ]
    command = [sys.executable, "-m", "ruff", *rule.split(), *ours]
    done = subprocess.run(
        command, cwd=ROOT, input=blocks[place], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
