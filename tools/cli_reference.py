"""Write `docs/cli.md` from the commands and settings themselves: `python tools/cli_reference.py [--check]`.

`--check` writes nothing and fails if the file is stale.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click

from cpserve.cli import main as cpserve
from trainer import METHODS, Settings

FILE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100
HEAD = """# The command line

Made by `python tools/cli_reference.py` from the commands themselves.

Exit codes: 0 done, 1 refused (one sentence and a hint on stderr), 2 a wrong option, 130 stopped by Ctrl-C.
"""


SETTINGS = """## Settings of training

In a TOML file for `train --config`, a line each, such as `batch = 4`. The defaults were chosen on the built-in base. Marks as in
[METHOD.md](METHOD.md): F the paper, B what it builds on, O our own choice.

| setting | default | |
|---|---|---|
"""


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """A command and all below it, in the order in which help lists them."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None, name
            yield from commands(below, click.Context(below, info_name=name, parent=context))


def root() -> click.Context:
    return click.Context(cpserve, info_name="cpserve", terminal_width=WIDTH, **cpserve.context_settings)


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, context in commands(cpserve, root()):
        depth = "#" * (context.command_path.count(" ") + 2)
        parts.append(f"{depth} {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join([*parts, settings()])


def settings() -> str:
    """A row for each setting, in the words of the string below it."""
    [body] = (node.body for node in ast.parse(inspect.getsource(Settings)).body if isinstance(node, ast.ClassDef))
    rows = []
    for field, words in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(words, ast.Expr) and isinstance(words.value, ast.Constant):
            name, meant = ast.unparse(field.target), inspect.cleandoc(str(words.value.value))
            meant = meant.replace("METHODS", ", ".join(f"`{method}`" for method in METHODS))
            rows.append(f"| `{name}` | `{json.dumps(getattr(Settings(), name))}` | {meant} |")
    return SETTINGS + "\n".join(row.replace("\n", " ") for row in rows) + "\n"


def main() -> None:
    made = reference()
    if "--check" not in sys.argv[1:]:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(made, encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != made:
        sys.exit(f"{FILE} is stale: run python tools/cli_reference.py")


if __name__ == "__main__":
    main()
