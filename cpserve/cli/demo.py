"""`cpserve demo`: the whole story on the built-in base."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from cpserve.cli._border import when_stopped, writing
from cpserve.cli._common import Common, common_options, examples
from cpserve.cli._show import reporting


@click.command(epilog=examples("cpserve demo --out demo"))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Where the report, the bundle and, unless --store says otherwise, the adapter go.",
)
@click.option(
    "--examples",
    "taught",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("examples"),
    show_default=True,
    metavar="DIR",
    help="Zips to teach from, and folders unseen/NAME of pictures to judge by.",
)
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Steps for each concept.")
@partial(common_options, store="the folder store in --out")
def demo(common: Common, out: Path, taught: Path, steps: int | None) -> None:
    """Tell the whole story on three example concepts.

    Teach them, draw and recognise them, export to ONNX, draw again; write one page about it.
    Stopped, it goes on where it was. The last line is one JSON object.
    """
    from adapter_store import Store
    from cpserve.demo import run_demo
    from trainer import Settings

    common.set_threads()
    settings = Settings() if steps is None else Settings(steps=steps)
    kept = "what was learned so far is kept; the same command goes on with it"
    with writing(out), reporting() as report, when_stopped(kept):
        out.mkdir(parents=True, exist_ok=True)
        store = common.store if common.root else Store(out / "store")
        done = run_demo(taught, store, out, settings, lambda words: click.echo(words, err=True), report)
    click.echo(f"open {done.report}", err=True)
    click.echo(done.json())
