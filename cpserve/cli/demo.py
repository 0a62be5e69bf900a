"""`cpserve demo`: the whole story on the built-in base."""

from __future__ import annotations

import shutil
from pathlib import Path

import click


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Where the report goes.",
)
@click.option(
    "--examples",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("examples"),
    show_default=True,
    help="Zips to teach from, and unseen/ to judge by.",
)
@click.option("--steps", type=click.IntRange(1), default=None, help="Training steps a concept.")
def demo(out: Path, examples: Path, steps: int | None) -> None:
    """Teach three example concepts, draw and recognise them, export to ONNX, draw again; write one page about it.

    \b
    Example:
      cpserve demo --out demo
    """
    from adapter_store import Store
    from cpserve.demo import run_demo
    from trainer import Settings

    store = out / "store"
    shutil.rmtree(store, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings() if steps is None else Settings(steps=steps)
    told = run_demo(examples, Store(store), out, settings, lambda words: click.echo(words, err=True))
    click.echo(f"open {told.report}", err=True)
    click.echo(told.json())
