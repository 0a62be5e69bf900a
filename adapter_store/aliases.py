"""Names that move, of versions in the local store: a small file each, replaced as a whole."""

from __future__ import annotations

from adapter_store.atomic import make_folder, staged, sync_folder
from adapter_store.local import LocalStore, listed
from adapter_store.ref import VERSION, check_alias, no_alias
from cpserve.errors import IntegrityError, RefError


def alias_names(store: LocalStore, name: str) -> list[str]:
    """The aliases of one adapter, sorted."""
    return listed(store.layout.aliases(name))


def aliased(store: LocalStore, name: str, alias: str) -> int:
    """The number of the version that one of `alias_names` stands for.

    Raises:
        IntegrityError: its file is damaged.
    """
    text = (store.layout.aliases(name) / alias).read_bytes().decode("ascii", "replace")
    match = VERSION.fullmatch(text.removesuffix("\n"))
    if not match or not store.layout.version(name, int(match[1])).is_file():
        raise IntegrityError(
            f"{name}@{alias}: aliases/{alias} names no version",
            hint=f"set it again: cpserve adapters alias set {name} {alias} vN",
            path=f"aliases/{alias}",
        )
    return int(match[1])


def set_alias(store: LocalStore, name: str, alias: str, number: int) -> None:
    """Make an alias stand for a version, whatever it stood for before.

    Raises:
        RefError: the alias is reserved or malformed, or there is no such version.
        StoreError: the lock is held or the disk is full.
    """
    target = store.layout.aliases(name) / check_alias(alias)
    if not store.layout.version(name, number).is_file():
        raise RefError(
            f"there is no {name}@v{number}", ref=f"{name}@v{number}", hint=f"see: cpserve adapters log {name}"
        )
    with store.held():
        make_folder(target.parent)
        with staged(store.layout.tmp, f"v{number}\n".encode()) as temporary:
            temporary.replace(target)
        sync_folder(target.parent)


def remove_alias(store: LocalStore, name: str, alias: str) -> None:
    """Make an alias stand for nothing.

    Raises:
        RefError: the adapter has no such alias.
        StoreError: the lock is held or the disk refuses.
    """
    with store.held():
        if alias not in (known := alias_names(store, name)):
            raise no_alias(name, alias, known)
        (store.layout.aliases(name) / alias).unlink()
        sync_folder(store.layout.aliases(name))
