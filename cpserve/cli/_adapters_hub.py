"""`cpserve adapters push`, `pull` and `alias`: what goes to the Hub and comes from it."""

from __future__ import annotations

import click

from cpserve.cli._common import Common, common_options, examples, hub_options
from cpserve.cli._show import emit, table


@click.command(
    epilog=examples(
        "cpserve adapters push pets hf://user/my-pets",
        "cpserve adapters push pets hf://user/my-pets --public",
        "cpserve adapters push pets hf://user/my-pets --fork my-pets-2",
    )
)
@click.argument("name")
@click.argument("hub", metavar="hf://USER/REPO")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made new; else only you.")
@click.option(
    "--fork", metavar="REPO", help="To another repository of the same user, beside the one that has moved on."
)
@hub_options
@common_options
def push(common: Common, name: str, hub: str, public: bool, fork: str | None) -> None:
    """Store on the Hub every version not there yet, a commit each."""
    from adapter_store.transfer import pullable

    target = pullable(hub)
    target = target.beside(fork) if fork else target
    moved = common.store.push(name, target, public=public)
    value = {"version": f"{target}@v{moved.version.manifest.version}", "pushed": list(moved.versions)}
    text = f"{value['version']} is there already"
    if moved.versions:
        text = f"pushed {', '.join(f'v{number}' for number in moved.versions)} to {target}"
    emit(value, text, as_json=common.json)


@click.command(
    epilog=examples(
        "cpserve adapters pull hf://user/my-pets",
        "cpserve adapters pull hf://user/my-pets@v3 --as pets",
        "cpserve adapters pull hf://user/my-pets@prod --for-training",
    )
)
@click.argument("ref", metavar="hf://USER/REPO[@REF]")
@click.option("--as", "name", metavar="NAME", help="What to call it here.  [default: as its repository]")
@click.option("--for-training", is_flag=True, help="Also what only learning the next concept needs.")
@hub_options
@common_options
def pull(common: Common, ref: str, name: str | None, for_training: bool) -> None:
    """Fetch a version from the Hub, every byte checked."""
    moved = common.store.pull(ref, name, for_training=for_training)
    value = {"version": str(moved.version), "versions": list(moved.versions), "files": list(moved.files)}
    files = f"{len(moved.files)} file{'' if len(moved.files) == 1 else 's'}"
    new = moved.versions or moved.files
    text = f"{moved.version} is here: {files} came from {ref}" if new else f"{moved.version} was here already"
    emit(value, text, as_json=common.json)


@click.group(
    epilog=examples("cpserve adapters alias set pets prod v3", "cpserve adapters alias list hf://user/my-pets")
)
def alias() -> None:
    """Give versions names that move."""


@alias.command("set", epilog=examples("cpserve adapters alias set pets prod v3"))
@click.argument("name")
@click.argument("alias_", metavar="ALIAS")
@click.argument("version", metavar="vN")
@hub_options
@common_options
def set_(common: Common, name: str, alias_: str, version: str) -> None:
    """Make an alias stand for a version.

    Whatever it stood for before. NAME is here or hf://USER/REPO.
    """
    from adapter_store.ref import VERSION

    if not VERSION.fullmatch(version):
        raise click.BadParameter(f"{version!r} is no version, such as v3", param_hint="vN")
    number = int(version[1:])
    common.store.set_alias(name, alias_, number)
    value = {"name": name, "alias": alias_, "version": number}
    emit(value, f"{name}@{alias_} is now v{number}", as_json=common.json)


@alias.command(epilog=examples("cpserve adapters alias remove pets prod"))
@click.argument("name")
@click.argument("alias_", metavar="ALIAS")
@hub_options
@common_options
def remove(common: Common, name: str, alias_: str) -> None:
    """Make an alias stand for nothing; the version stays."""
    common.store.remove_alias(name, alias_)
    emit({"name": name, "removed": alias_}, f"{name} has no alias {alias_} any more", as_json=common.json)


@alias.command("list", epilog=examples("cpserve adapters alias list pets"))
@click.argument("name")
@hub_options
@common_options
def list_(common: Common, name: str) -> None:
    """The aliases of an adapter and the versions that they stand for."""
    aliases = common.store.aliases(name)
    rows = [(each, f"v{number}") for each, number in aliases.items()]
    emit(aliases, table(("alias", "version"), rows) if rows else f"{name} has no alias", as_json=common.json)
