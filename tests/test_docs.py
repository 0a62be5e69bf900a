"""The documentation is held to the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from cpserve.cli import main
from tools.cli_reference import FILE, commands, reference, root

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tools" / "emoji64" / "README.md"]


def lines(text: str) -> list[str]:
    """The `cpserve ...` commands of shell blocks, continued lines joined."""
    blocks = re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", text, re.DOTALL)
    joined = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in joined if line.startswith("cpserve ")]


def parse(line: str) -> None:
    """Resolve commands and check options, without running anything."""
    command: click.Command = main
    args = shlex.split(line, comments=True)[1:]
    context = None
    while isinstance(command, click.Group):
        name, below, args = command.resolve_command(click.Context(command, parent=context), args)
        assert name is not None
        assert below is not None
        context = click.Context(command, info_name=command.name, parent=context)
        command = below
    command.make_context(command.name, args, parent=context)


def examples() -> list[str]:
    """The examples in the commands' own help."""
    helps = [command.get_help(context) for command, context in commands(main, root())]
    return [
        line.strip()
        for words in helps
        for line in words.splitlines()
        if line.startswith("  ") and line.strip().startswith("cpserve ")
    ]


def test_the_reference_is_fresh() -> None:
    """docs/cli.md is what `python tools/cli_reference.py` would write."""
    assert FILE.read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize("line", [*lines((ROOT / "README.md").read_text(encoding="utf-8")), *examples()])
def test_every_command_shown_can_be_typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's shell blocks and the examples in help name commands and options that exist."""
    monkeypatch.chdir(ROOT)
    parse(line)


def test_every_program_shown_knows_its_options() -> None:
    """`python x.py --option` names a file beside the page or in the checkout, and an option that stands in it."""
    seen = 0
    for page in PAGES:
        for path, words in re.findall(r"python (\S+?\.py)([^`\n]*)", page.read_text(encoding="utf-8")):
            beside = page.parent / path
            code = (beside if beside.exists() else ROOT / path).read_text(encoding="utf-8")
            seen += 1
            for option in re.findall(r"--[a-z-]+", words):
                assert f'"{option}"' in code, (page, path, option)
    assert seen > 20


def test_a_wrong_command_would_be_found() -> None:
    """The check above can fail."""
    for wrong in (
        "cpserve train --concpt dog.zip",
        "cpserve trian",
        "cpserve adapters show",
        "cpserve generate x --steps 0",
    ):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_links_lead_somewhere() -> None:
    """Links within the repository name a file that exists, and a heading of it where they name one."""
    for page in PAGES:
        for path, heading in re.findall(r"\]\(([^):#]*)#?([^):]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / path if path else page
            assert target.exists(), (page, path)
            if heading:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, (
                    page,
                    heading,
                )
