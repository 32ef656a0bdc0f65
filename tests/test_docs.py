"""What the documents say can be typed: commands, options, settings and links exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from penjing import cli, recipe

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
def test_commands_and_options_exist(document: str, line: str):
    words = shlex.split(line.split("#")[0])
    command, *words = typer.main.get_command(cli.app), *words[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= known, f"{document}: {used - known}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", ["compress.md"])
def test_recipes_are_read(document: str):
    for block in blocks(ROOT / "docs" / document, "yaml"):
        assert recipe.parse(yaml.safe_load(block)).stages
