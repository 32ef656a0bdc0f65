"""What the documents say can be typed: commands, options, settings and links exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import penjing
from penjing import recipe
from penjing.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"\s*penjing \w", line):
                    found.append((document.name, line))
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_parse(document: str, line: str):
    """As typed: commands, options and their values, and whatever must be given; nothing is run."""
    command, words = typer.main.get_command(main.app), shlex.split(re.split(r"\s[#>]", line)[0])[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with command.make_context(command.name, words):
        pass


@pytest.mark.parametrize("wrong", ["train x --data d", "bench a.onnx --runs many", "pack --what"])
def test_commands_that_do_not_parse_are_told(wrong: str):
    with pytest.raises(Exception, match=r"output|valid integer|--what"):
        test_commands_parse("here", f"penjing {wrong}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", ["compress.md"])
def test_recipes_are_read(document: str):
    for block in blocks(ROOT / "docs" / document, "yaml"):
        assert recipe.parse(yaml.safe_load(block)).stages


def test_every_public_name_has_an_example_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The blocks of python.md, one after the other, in an empty folder."""
    examples = "".join(blocks(ROOT / "docs" / "python.md", "python"))
    shown = set(re.findall(r"\bpj\.(\w+)", examples))
    assert set(penjing.__all__) <= shown, sorted(set(penjing.__all__) - shown)
    monkeypatch.chdir(tmp_path)
    exec(compile(examples, "docs/python.md", "exec"), {"__name__": "examples"})
