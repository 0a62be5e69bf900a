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


@pytest.mark.parametrize("page", ["README.md", "tools/emoji64/README.md"])
def test_every_program_shown_knows_its_options(page: str) -> None:
    """`python x.py --option` names a file beside the page, and an option that stands in it."""
    shown = re.findall(r"python (\S+?\.py)([^`\n]*)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(shown) > 5
    for path, words in shown:
        code = ((ROOT / page).parent / path).read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z-]+", words):
            assert f'"{option}"' in code, (path, option)


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


def test_files_that_the_readme_links_to_exist() -> None:
    """Links within the repository lead somewhere."""
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
