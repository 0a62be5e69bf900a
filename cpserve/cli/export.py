"""`cpserve export`."""

from __future__ import annotations

from pathlib import Path

import click

from cpserve.cli._border import writing
from cpserve.cli._common import Common, base_option, common_options, examples, open_base
from cpserve.cli._show import emit, table

MIB = 1 << 20


@click.command(epilog=examples("cpserve export --onnx --out bundle", "cpserve export --onnx --out bundle --dry-run"))
@click.option("--onnx", is_flag=True, required=True, help="For ONNX Runtime.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, metavar="BUNDLE")
@base_option
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@common_options
def export(common: Common, onnx: bool, out: Path, base: str | None, dry_run: bool) -> None:  # noqa: ARG001 - the one target
    """Compile a base model, for all adapters.

    Writes an engine bundle, a folder for --bundle; one is enough for every adapter and version.
    """
    model = open_base(common, base)
    from export.build import plan_export

    plan = plan_export(model, out)
    value = {
        "action": plan.action,
        "out": str(out),
        "key": plan.recipe.key,
        "bytes": plan.bytes,
        "files": [{"name": f.name, "bytes": f.bytes, "what": f.what} for f in plan.files],
    }
    if dry_run:
        files = table(("file", "about", "what"), [(f.name, f"{f.bytes / MIB:,.1f} MiB", f.what) for f in plan.files])
        emit(value, f"{out}: {plan.action}\n\n{files}", as_json=common.json)
        return
    with writing(out):
        bundle = plan.execute(lambda what: click.echo(what, err=True))
    parity = dict(bundle.manifest.parity)
    made = f"{out}: {plan.action}, at most {max(parity.values()):.1e} away from torch"
    emit(value | {"parity": parity}, f"{made}\nnext: cpserve generate PROMPT --bundle {out}", as_json=common.json)
