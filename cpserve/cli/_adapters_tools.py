"""`cpserve adapters diff`, `gc`, `delete`, `annotate`, `import` and `convert`: looking, tidying, and other programs' files."""

from __future__ import annotations

from pathlib import Path

import click

from cpserve.cli._border import write, writing
from cpserve.cli._common import (
    Common,
    base_option,
    common_options,
    examples,
    hub_options,
    note_unfinished,
    open_base,
)
from cpserve.cli._show import emit, note, pairs, table

MIB = 1 << 20


@click.command(epilog=examples("cpserve adapters diff pets@v1 pets@v2", "cpserve adapters diff pets hf://user/my-pets"))
@click.argument("before", metavar="REF")
@click.argument("after", metavar="REF")
@hub_options
@common_options
def diff(common: Common, before: str, after: str) -> None:
    """What changed between two versions.

    Concepts, settings, scores, files, and for each layer how far its weights moved (Frobenius norm).
    """
    from adapter_store.diff import diff as compare

    old, new = common.store.version(before), common.store.version(after)
    found = compare(old, new)
    groups = {"concepts": found.concepts, "settings": found.settings, "scores": found.scores}
    files = {path: _file_change(*change) for path, change in found.files.items()}
    layers = {name: {"moved": m, "before": b, "after": a} for name, (m, b, a) in found.layers.items()}
    value = {"before": str(old), "after": str(new), **groups, "files": files, "layers": layers}
    told = [(what, name, *map(_shown, change)) for what, group in groups.items() for name, change in group.items()]
    told += [("file", path, "", change) for path, change in files.items()]
    moved = [(name, f"{m:.4g}", f"{b:.4g}", f"{a:.4g}") for name, (m, b, a) in found.layers.items() if m]
    parts = [f"{old} -> {new}"]
    parts += [table(("what", "name", "before", "after"), told)] if told else ["nothing that the manifests say"]
    parts += [table(("layer", "moved", "before", "after"), moved)] if moved else ["no layer moved"]
    emit(value, "\n\n".join(parts), as_json=common.json)


def _file_change(before: str | None, after: str | None) -> str:
    return "added" if before is None else "removed" if after is None else "changed"


def _shown(value: object) -> str:
    return "" if value is None else str(value)


@click.command(epilog=examples("cpserve adapters gc --dry-run", "cpserve adapters gc"))
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@common_options
def gc(common: Common, dry_run: bool) -> None:
    """Delete what no version of any adapter refers to."""
    store = common.store
    plan = store.plan_gc()
    gone = list(plan.garbage) if dry_run else plan.execute()
    rows = [(each.path.relative_to(store.root).as_posix(), each.bytes, each.what) for each in gone]
    value = {"deleted": not dry_run, "files": [{"path": p, "bytes": b, "what": w} for p, b, w in rows]}
    total = f"{'would delete' if dry_run else 'deleted'} {len(rows)} files, {sum(b for _, b, _ in rows) / MIB:,.1f} MiB"
    text = f"{table(('file', 'bytes', 'what'), rows)}\n\n{total}" if rows else "nothing to delete"
    emit(value, text, as_json=common.json)
    note_unfinished(store)


@click.command(
    epilog=examples(
        "cpserve adapters delete pets",
        "cpserve adapters delete pets --yes --json",
        "cpserve adapters delete pets --unfinished",
    )
)
@click.argument("name")
@click.option("--unfinished", is_flag=True, help="Only what a training that was stopped keeps; the versions stay.")
@click.option("--yes", is_flag=True, help="Do not ask first.")
@common_options
def delete(common: Common, name: str, unfinished: bool, yes: bool) -> None:
    """Delete an adapter from this machine.

    With all its versions and samples, what an unfinished run keeps of its pictures, and whatever else no other adapter
    refers to. On the Hub a repository is deleted in its settings.
    """
    if name.startswith("hf://"):
        raise click.UsageError("what is on the Hub is deleted there, in the repository's settings")
    from cpserve.learning import delete as delete_all
    from cpserve.learning import drop_unfinished

    store = common.store
    begun = store.run(name).exists()
    if not begun:
        store.check_here(name)
    of_it = "what its unfinished training keeps"
    what = of_it if unfinished else f"its {store.head(name)} versions{f' and {of_it}' if begun else ''}"
    if not yes and (begun or not unfinished):
        click.confirm(f"{name}: delete {what}?", abort=True, err=True)
    if unfinished:
        drop_unfinished(store, name)
        emit({"unfinished": name}, f"{name}: deleted {of_it}", as_json=common.json)
        return
    versions, freed = delete_all(store, name)
    value = {"deleted": name, "versions": versions, "bytes": freed}
    emit(value, f"deleted {name}: {versions} versions, {freed / MIB:,.1f} MiB", as_json=common.json)


@click.command(epilog=examples("cpserve eval pets --out measured", "cpserve adapters annotate pets measured"))
@click.argument("name")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@hub_options
@common_options
def annotate(common: Common, name: str, folder: Path) -> None:
    """Put on an adapter's card what cpserve eval measured.

    The newest version is stored again, as a new one, with the scores, and on its card what is left of each concept after
    every later one, as a picture.
    """
    from adapter_store.layout import MEASURED
    from adapter_store.measured import annotated

    file = folder / MEASURED
    older = common.store.version(name)
    draft, files = annotated(older, str(file), _read(file))
    version = common.store.commit(name, files, draft, expected_head=older.manifest.version)
    text = f"{version} is {older} with what was measured of it"
    emit({"version": str(version), "from": str(older)}, text, as_json=common.json)


def _read(file: Path) -> bytes:
    from cpserve.errors import AdapterError

    try:
        return file.read_bytes()
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror or error}", hint="check its name and its permissions"
        ) from error


@click.command(
    "import",
    epilog=examples(
        "cpserve adapters import style.safetensors style --base user/model",
        "cpserve adapters import lora.safetensors hf://user/my-lora --base user/model",
    ),
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@click.argument("name")
@base_option
@hub_options
@common_options
def import_(common: Common, file: Path, name: str, base: str | None) -> None:
    """Store another program's LoRA as a version.

    A .safetensors file with diffusers' or kohya's names. One of keys and values alone can be drawn with at once; what touches
    other layers is kept for export --merge. What is refused is refused with the reason.
    """
    from adapter_store.foreign import check_shapes, draft_of, read_lora

    content = _read(file)
    lora = read_lora(file.name, content)
    spec = open_base(common, base).spec
    width = spec.sites.weight.shape[1]
    check_shapes(file.name, lora, {f"unet.{s.name}.{p}": (s.width, width) for s, p, _ in spec.sites.parts})
    draft, files = draft_of(lora, spec.entry, file.name, content)
    version = common.store.commit(name, files, draft, expected_head=None)
    value = {"version": str(version), "layers": lora.layers, "modules": len(lora.modules), "others": lora.others}
    use = f"cpserve generate PROMPT --adapter {version}"
    if lora.layers == "other":
        note(f"{len(lora.others)} of its {len(lora.modules)} layers are no keys or values, such as {lora.others[0]}")
        use = f"cpserve export --merge {version}"
    emit(value, f"{version} holds {file.name}\nuse it: {use}", as_json=common.json)


@click.command(epilog=examples("cpserve adapters convert pets@v3 --format kohya --out pets.safetensors"))
@click.argument("ref")
@click.option(
    "--format", "tongue", type=click.Choice(["kohya", "diffusers"]), required=True, help="Whose names to use."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE", help="The file to write."
)
@hub_options
@common_options
def convert(common: Common, ref: str, tongue: str, out: Path) -> None:
    """Write a version's weights for other programs.

    Under the names that they look for: ComfyUI and the WebUIs read kohya's.
    """
    from adapter_store.foreign import read_lora, write_lora
    from cpserve.errors import AdapterError
    from cpserve.manifest import WEIGHTS

    version = common.store.version(ref)
    written = write_lora(read_lora(f"{version}: {WEIGHTS}", version.read(WEIGHTS)), tongue)  # type: ignore[arg-type]
    with writing(out):
        if out.exists() and out.read_bytes() != written:
            raise AdapterError(f"{out} is another file, and is left alone", hint="choose another --out, or delete it")
    write(out, written)
    tokens = [c.token for c in version.manifest.concepts]
    if tokens:
        note(f"the words {', '.join(tokens)} are in the version's embeddings/, which such programs load as embeddings")
    value = {"version": str(version), "format": tongue, "file": str(out), "bytes": len(written)}
    emit(value, pairs(value), as_json=common.json)
