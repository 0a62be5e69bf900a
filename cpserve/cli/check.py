"""`cpserve check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cpserve.cli._common import Common, common_options, examples
from cpserve.cli._show import emit, note, table


@click.command(epilog=examples("cpserve check dog.zip", "cpserve check photos/ --json"))
@click.argument("path", type=click.Path(path_type=Path), metavar="ZIP_OR_FOLDER")
@common_options
@click.pass_context
def check(ctx: click.Context, common: Common, path: Path) -> None:
    """Show which pictures training would take, and which refuse.

    Exit 1 if it would refuse a picture.
    """
    from cpserve.concept import inspect_concept, name_of
    from cpserve.errors import RefError

    try:
        name_of(path)
    except RefError as error:
        note(f"{error}: {error.hint}")
    report = inspect_concept(path)
    value = {
        "pictures": [asdict(seen) for seen in report.seen],
        "refused": [{"entry": r.entry, "rule": r.rule, "hint": r.hint} for r in report.refusals],
    }
    rows = [(s.entry, "x".join(map(str, s.size)), s.caption or "", "; ".join(s.notes)) for s in report.seen]
    parts = [table(("picture", "size", "caption", "note"), rows)] if rows else []
    if report.refusals:
        parts.append(
            table(("refused", "because it", "what helps"), [(r.entry, r.rule, r.hint) for r in report.refusals])
        )
    emit(value, "\n\n".join(parts), as_json=common.json)
    if report.refusals:
        ctx.exit(1)
