"""`cpserve train` on an adapter that lives on the Hub: from its head, and back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cpserve.cli._common import Common
from cpserve.cli._show import note

if TYPE_CHECKING:
    from adapter_store import Ref
    from cpserve.manifest import Manifest


@dataclass(frozen=True)
class Learner:
    """The adapter that learns: its name here, its newest manifest, and where on the Hub it goes to."""

    name: str
    newest: Manifest | None
    back_to: Ref | None = None

    @property
    def head(self) -> int:
        return self.newest.version if self.newest else 0

    @property
    def known(self) -> list[str]:
        return [concept.name for concept in self.newest.concepts] if self.newest else []

    def push(self, common: Common) -> None:
        """Bring what was learned to the Hub, if that was asked for; whoever was not the first is told how to go on."""
        if self.back_to:
            pushed = common.store.push(self.name, self.back_to).versions
            note(f"pushed {', '.join(f'v{number}' for number in pushed) or 'nothing new'} to {self.back_to}")


def learner(
    common: Common, adapter: str, name: str | None, *, push: bool, fork: str | None, past: bool, dry_run: bool
) -> Learner:
    """The adapter that `--adapter` names; one on the Hub is fetched first, with all that learning needs.

    With `past`, that is the version in which each concept was learned, too.
    """
    from adapter_store import Ref
    from cpserve.manifest import check_name

    if not adapter.startswith("hf://"):
        if name or push or fork:
            raise click.UsageError("--as, --push and --fork go with --adapter hf://USER/REPO")
        newest = common.store.version(adapter).manifest if common.store.head(check_name(adapter)) else None
        return Learner(adapter, newest)
    hub = Ref.parse(adapter)
    if hub.at is not None:
        raise click.UsageError(f"learning goes on from the newest version: write --adapter hf://{hub.name}")
    if fork and not push:
        raise click.UsageError("--fork goes with --push")
    back_to = (hub.beside(fork) if fork else hub) if push else None
    if dry_run:
        return Learner(name or hub.local_name, common.store.version(hub).manifest, back_to)
    pulled = common.store.pull(hub, name, for_training=True).version
    for number in {concept.since for concept in pulled.manifest.concepts} if past else ():
        common.store.pull(Ref(hub.name, f"v{number}", hub=True), pulled.name)
    return Learner(pulled.name, common.store.version(pulled.name).manifest, back_to)


def hub_training_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`--as`, `--push` and `--fork`, for `learner`."""
    words = "To another repository of the same user, beside one that has moved on."
    verb = click.option("--fork", metavar="REPO", help=words)(verb)
    verb = click.option("--push", is_flag=True, help="Store what was learned on the Hub, where the adapter came from.")(
        verb
    )
    words = "What to call an adapter from the Hub here.  [default: as its repository]"
    return click.option("--as", "local", metavar="NAME", help=words)(verb)
