"""The test Hub before foreign judges, where they are installed: what was pushed is what git-lfs fetches and a mirror passes on."""

# ruff: noqa: F811 - fixtures are named by arguments

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from adapter_store import Store
from tests.hubserver import HubServer
from tests.hubserver.client import hub  # noqa: F401
from tests.hubserver.content import files_of, learn
from tests.hubserver.repo import ENVIRONMENT

PETS = "hf://me/pets"


@pytest.fixture
def store(tmp_path: Path, hub: HubServer) -> Store:
    """A store with three versions of `pets`, which everybody may read on the Hub."""
    store = Store(tmp_path / "mine", endpoint=hub.endpoint)
    learn(store, count=3)
    store.push("pets", PETS, public=True)
    return store


@pytest.mark.skipif(not shutil.which("git-lfs"), reason="git-lfs is not installed")
def test_git_lfs_fetches_every_version_and_finds_nothing_wrong(store: Store, hub: HubServer, tmp_path: Path) -> None:
    """A clone with its large files passes `git lfs fsck`, and each tag's files are the version's, byte by byte."""
    clone = tmp_path / "clone"

    def git(*args: object) -> None:
        subprocess.run(["git", *map(str, args)], cwd=tmp_path, check=True, capture_output=True, env=ENVIRONMENT)

    git("clone", "-q", hub.repos["me/pets"].folder, clone)
    git("-C", clone, "lfs", "install", "--local", "--skip-smudge")
    git("-C", clone, "config", "lfs.url", f"{hub.endpoint}/me/pets.git/info/lfs")
    for number in (1, 2, 3):
        git("-C", clone, "checkout", "-q", f"v{number}")
        git("-C", clone, "lfs", "pull")
        git("-C", clone, "lfs", "fsck")
        version = store.version(f"pets@v{number}")
        assert {path: (clone / path).read_bytes() for path in version.paths()} == files_of(number)


@pytest.fixture
def mirror(hub: HubServer, tmp_path: Path) -> Iterator[str]:
    """The address of olah, a mirror of Hubs, before the test Hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{free.getsockname()[1]}"
    there = hub.endpoint.removeprefix("http://")
    options = {
        "host": "127.0.0.1",
        "port": here.partition(":")[2],
        "hf-scheme": "http",
        "hf-netloc": there,
        "hf-lfs-netloc": there.replace("127.0.0.1", "localhost"),
        "mirror-scheme": "http",
        "mirror-netloc": here,
        "mirror-lfs-netloc": here,
        "repos-path": str(tmp_path / "olah"),
        "log-path": str(tmp_path / "log"),
    }
    command = ["olah-cli", *(word for name, value in options.items() for word in (f"--{name}", value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(0.25)
            try:
                urllib.request.urlopen(f"http://{here}/", timeout=1)
            except HTTPError:
                break  # it answers
            except URLError:
                continue
            else:
                break
        yield f"http://{here}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(not shutil.which("olah-cli"), reason="olah is not installed")
def test_a_mirror_passes_versions_on(
    store: Store, tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever pulls by `--endpoint` from a mirror, by version, alias or nothing, gets the same bytes, checked the same."""
    store.set_alias(PETS, "prod", 2)
    monkeypatch.delenv("HF_TOKEN")
    for ref, number in ((f"{PETS}@v1", 1), (f"{PETS}@prod", 2), (PETS, 3)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"cache{number}"))
        other = Store(tmp_path / f"other{number}", endpoint=mirror)
        version = other.pull(ref, for_training=True).version
        assert {path: version.read(path) for path in version.paths()} == files_of(number)
        assert other.verify() == []
