"""The command line: a thin second user of the library. Parsing, printing and one error border; what is done is done elsewhere.

Every verb is one file, read when it is asked for; what a verb needs of torch is imported when it runs.
"""

from __future__ import annotations

import importlib

import click

from cpserve.cli._border import BorderGroup

VERBS = ("train", "check", "generate", "classify", "eval", "export", "adapters", "doctor", "demo")


class _Verbs(BorderGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"cpserve.cli.{cmd_name}")
        command: click.Command = getattr(module, "eval_" if cmd_name == "eval" else cmd_name)
        return command


@click.group(
    cls=_Verbs, name="cpserve", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="cpserve")
def main() -> None:
    """Teach a text-to-image diffusion model new concepts one after another; keep every version; draw and recognise them."""
