"""What several verbs share: the options that all have, opening the store, an engine and adapters."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpserve.cli._show import note
from cpserve.engines import ENGINES

if TYPE_CHECKING:
    from adapter_store import Store, Version
    from cpserve.adapter import Adapter
    from cpserve.base import BaseModel
    from cpserve.engine import Engine
    from cpserve.manifest import BaseEntry, Manifest

BASE = "builtin:emoji64"


@dataclass(frozen=True)
class Common:
    """The options of every verb."""

    json: bool
    threads: int | None
    root: Path | None
    endpoint: str | None = None
    token_file: Path | None = None

    @property
    def store(self) -> Store:
        from adapter_store import Store

        return Store(self.root, endpoint=self.endpoint, token_file=self.token_file)

    @property
    def token_file_of_bases(self) -> Path | None:
        """The token file, if the Hub that it was named for is the one that bases come from."""
        from cpserve.tokens import address

        return self.token_file if address(self.endpoint) == address() else None

    def set_threads(self) -> None:
        """Import torch, with the threads asked for."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)


def common_options(
    verb: Callable[..., None], store: str = "$CPSERVE_HOME or ~/.local/share/cpserve"
) -> Callable[..., None]:
    """Give a verb the options of all, handed over as its first argument, a `Common`; `store` is where it looks by default."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON value on stdout, and nothing else there.")
    @click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: one a core]")
    @click.option(
        "--store",
        "root",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help=f"Where adapters are kept.  [default: {store}]",
    )
    @functools.wraps(verb)
    def command(
        *,
        as_json: bool,
        threads: int | None,
        root: Path | None,
        endpoint: str | None = None,
        token_file: Path | None = None,
        **options: Any,
    ) -> None:
        verb(Common(as_json, threads, root, endpoint, token_file), **options)

    return command


def hub_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`--endpoint` and `--token-file`, for verbs that take `hf://` references; they end up in `Common`."""
    verb = click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="A file with the Hub token to use.  [default: $HF_TOKEN, or for huggingface.co the stored one]",
    )(verb)
    where = "The Hub that hf:// means.  [default: $HF_ENDPOINT or https://huggingface.co]"
    return click.option("--endpoint", metavar="URL", help=where)(verb)


def base_option(verb: Callable[..., None], default: str = BASE) -> Callable[..., None]:
    """`--base`, None where it is left out."""
    words = f"The base model: {BASE}, a diffusers folder, a Hub id or a .safetensors file.  [default: {default}]"
    return click.option("--base", metavar="BASE", help=words)(verb)


adapters_base_option = functools.partial(base_option, default=f"the adapter's, else {BASE}")


def engine_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`--engine`, `--bundle` and `--base`, for `open_for`."""
    words = (
        "What runs the UNet: eager is torch, compile the same in half precision through torch.compile, which takes a minute "
        "at first; auto takes what the bundle was made for, where one is given, else eager."
    )
    verb = adapters_base_option(verb)
    verb = click.option(
        "--bundle",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="An engine bundle, made by: cpserve export.",
    )(verb)
    return click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help=words)(verb)


class NumberRange(click.FloatRange):
    """A number between two bounds, which "not a number" is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


def examples(*lines: str) -> str:
    """A command's epilog."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def open_base(common: Common, base: str | None, revision: str | None = None) -> BaseModel:
    """Load the base model asked for."""
    common.set_threads()
    from cpserve.base import load_base

    return load_base(base or BASE, revision=revision, token_file=common.token_file_of_bases)


def note_unfinished(store: Store) -> None:
    """Say which trainings were stopped: they keep latents of pictures."""
    for name in store.unfinished():
        note(
            f"a training of {name} is not finished and keeps latents of its pictures: go on with train --resume, or drop it"
            f" with cpserve adapters delete {name} --unfinished"
        )


def base_of(base: str | None, ref: str, manifest: Manifest | None) -> tuple[str, str | None]:
    """The base model named, else the one that an adapter was learned on, and its commit on the Hub where the adapter knows it.

    Raises:
        AdapterError: none is named, and the adapter's is not on this machine: it may be a stranger's, who is not to choose what
            is fetched.
    """
    from cpserve.errors import AdapterError
    from cpserve.manifest import plain

    if manifest is None or base not in {None, manifest.base.id}:
        return base or BASE, None
    known = manifest.base
    if base is None and known.id != BASE and not _is_here(known):
        raise AdapterError(
            f"{ref} was learned on {plain(known.id)}, which is not here and only fetched when you name it",
            hint=f"add --base {plain(known.id)}, or the folder where that model is now",
        )
    return known.id, known.commit


def _is_here(base: BaseEntry) -> bool:
    """Whether a base is a folder of this machine, or was fetched from the Hub before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base.id, "model_index.json", revision=base.commit)
    except HFValidationError:
        found = None
    return isinstance(found, str) or os.path.exists(base.id)  # noqa: PTH110 - pathlib's raises where a name is too long


def open_for(common: Common, engine: str, bundle: Path | None, base: str | None, refs: Sequence[str]) -> Engine:
    """Open the engine asked for, of the base that the adapters `refs` were learned on where none is named."""
    if bundle and (base or engine in {"eager", "compile"}):
        other = f"--base {base}" if base else f"--engine {engine}"
        raise click.UsageError(f"a bundle holds its own base model, compiled: leave out --bundle or {other}")
    common.set_threads()
    from cpserve.engine import open_engine

    ref = refs[0] if refs and not bundle else ""
    source, revision = base_of(base, ref, common.store.version(ref).manifest if ref else None)
    return open_engine(
        source,
        revision=revision,
        token_file=common.token_file_of_bases,
        engine=engine,
        bundle=bundle,
        threads=common.threads,
    )


def read_adapter(engine: Engine, version: Version) -> Adapter:
    """A version's adapter, checked to fit the engine's base."""
    from cpserve.adapter import Adapter, check_fits

    if warning := check_fits(version.manifest, engine.spec.entry):
        note(warning)
    return Adapter.read(version.manifest, version.read)
