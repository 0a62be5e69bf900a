"""`cpserve adapters`: the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpserve.cli._adapters_hub import alias, pull, push
from cpserve.cli._adapters_tools import annotate, convert, delete, diff, gc, import_
from cpserve.cli._common import Common, common_options, examples, hub_options, note_unfinished
from cpserve.cli._show import emit, note, pairs, table
from cpserve.errors import IntegrityError, printable

if TYPE_CHECKING:
    from cpserve.manifest import Manifest

FEW = 6  # concepts named in a row


@click.group(
    epilog=examples(
        "cpserve adapters list",
        "cpserve adapters log pets",
        "cpserve adapters rollback pets@v2",
        "cpserve adapters push pets hf://user/my-pets",
    )
)
def adapters() -> None:
    """Stored adapters, here and on the Hub.

    Wherever a NAME or REF is asked for, hf://USER/REPO[@REF] is one, too.
    """


for _command in (push, pull, alias, diff, annotate, delete, gc, import_, convert):
    adapters.add_command(_command)


@adapters.command(
    "list",
    epilog=examples("cpserve adapters list", "cpserve adapters list --json", "cpserve adapters list hf://user/my-pets"),
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@hub_options
@common_options
@click.pass_context
def list_(ctx: click.Context, common: Common, names: tuple[str, ...]) -> None:
    """All adapters that are here, or those named.

    Each with its newest version and its aliases. Exit 1 if one is damaged, which is left out.
    """
    store, heads, aliases, damaged = common.store, {}, {}, False
    for name in names or store.names():
        try:
            aliases[name] = store.aliases(name)
            heads[name] = store.version(name).manifest
        except IntegrityError as error:
            note(f"{error}; {error.hint}")
            damaged = True
    value = [_summary(name, head) | {"aliases": aliases[name]} for name, head in heads.items()]
    rows = [
        (
            name,
            f"v{head.version}",
            ", ".join(f"{alias}=v{number}" for alias, number in aliases[name].items()),
            _names(head),
            head.method,
            head.base.id,
        )
        for name, head in heads.items()
    ]
    empty = f"{store.root} holds no adapter; learn one: cpserve train --concept ZIP"
    emit(
        value,
        table(("name", "newest", "aliases", "concepts", "method", "base"), rows) if rows else empty,
        as_json=common.json,
    )
    if not names:
        note_unfinished(store)
    if damaged:
        ctx.exit(1)


@adapters.command(epilog=examples("cpserve adapters log pets", "cpserve adapters log hf://user/my-pets"))
@click.argument("name")
@hub_options
@common_options
def log(common: Common, name: str) -> None:
    """All versions of an adapter, newest first."""
    manifests = common.store.log(name)
    rows = [(f"v{m.version}", m.created, m.method, _names(m)) for m in manifests]
    text = table(("version", "created", "method", "concepts"), rows)
    emit([_summary(name, m) for m in manifests], text, as_json=common.json)


@adapters.command(epilog=examples("cpserve adapters show pets@v2", "cpserve adapters show pets --json"))
@click.argument("ref")
@hub_options
@common_options
def show(common: Common, ref: str) -> None:
    """What a version is: its concepts, settings, scores and files."""
    from msgspec import to_builtins

    version = common.store.version(ref)
    manifest = version.manifest
    value = to_builtins(manifest)
    top = {"version": str(version), "created": manifest.created, "method": manifest.method, "base": manifest.base.id}
    concepts = [
        (
            c.name,
            c.token,
            c.class_word or "",
            f"v{c.since}",
            c.pictures,
            "" if c.dc_accuracy is None else f"{c.dc_accuracy:.0%}",
        )
        for c in manifest.concepts
    ]
    parts = [
        pairs(top),
        table(("concept", "say", "class word", "since", "pictures", "recognised when learned"), concepts),
        *(pairs(dict(group)) for group in (manifest.settings, manifest.metrics, manifest.libraries) if group),
        table(("file", "bytes", "sha256"), [(f.path, f.size, f.sha256) for f in manifest.files]),
    ]
    emit(value, "\n\n".join(parts), as_json=common.json)


@adapters.command(
    epilog=examples(
        "cpserve adapters verify", "cpserve adapters verify pets", "cpserve adapters verify hf://user/my-pets --repair"
    )
)
@click.argument("name", required=False)
@click.option("--repair", is_flag=True, help="On the Hub: set tags that are missing or were moved.")
@hub_options
@common_options
@click.pass_context
def verify(ctx: click.Context, common: Common, name: str | None, repair: bool) -> None:
    """Look for damage in one adapter, or in all that are here.

    Every byte is read, and what is damaged is named; exit 1 if anything is.
    """
    if repair and name is None:
        raise click.UsageError("--repair needs a NAME")
    repaired = common.store.repair(name) if repair and name else []
    problems = common.store.verify(name)
    value = [{"ref": p.ref, "path": p.path, "what": p.what} for p in problems]
    count = 1 if name else len(common.store.names())
    text = (
        "\n".join(printable(p.what) for p in problems) or f"{count} adapter{'' if count == 1 else 's'}, nothing damaged"
    )
    if repaired:
        note(f"set {', '.join(repaired)} again")
    emit(value, text, as_json=common.json)
    if problems:
        ctx.exit(1)


@adapters.command(epilog=examples("cpserve adapters rollback pets@v2"))
@click.argument("ref")
@hub_options
@common_options
def rollback(common: Common, ref: str) -> None:
    """Store an older version again as the newest; nothing is lost."""
    store = common.store
    older = store.version(ref)
    if older.manifest.version == store.head(older.name):
        raise click.UsageError(f"{older} is the newest version: name an older one")
    version = store.rollback(older)
    emit({"version": str(version), "from": str(older)}, f"{version} now holds what {older} does", as_json=common.json)


@adapters.command(epilog=examples("cpserve adapters checkout pets@v2 pets-v2"))
@click.argument("ref")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--for-training", is_flag=True, help="Also what only learning the next concept needs.")
@hub_options
@common_options
def checkout(common: Common, ref: str, folder: Path, for_training: bool) -> None:
    """Write a version as a folder that plain diffusers loads.

    With its samples and a card that says how.
    """
    store = common.store
    version = store.version(ref)
    written = store.checkout(version, folder, for_training=for_training)
    emit({"version": str(version), "folder": str(written)}, f"{version} is in {written}", as_json=common.json)


def _names(manifest: Manifest) -> str:
    """All concepts, or of more than a line takes the first, the last, and how many there are."""
    names = [c.name for c in manifest.concepts]
    return ", ".join(names) if len(names) <= FEW else f"{', '.join(names[: FEW - 2])}, ... {names[-1]} ({len(names)})"


def _summary(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": name,
        "version": manifest.version,
        "created": manifest.created,
        "method": manifest.method,
        "base": manifest.base.id,
        "concepts": [{"name": c.name, "token": c.token, "since": c.since} for c in manifest.concepts],
        "metrics": dict(manifest.metrics),
    }
