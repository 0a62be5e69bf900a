"""Laws of sudden death: push, pull, rollback and gc killed at any moment; the next command works and everything verifies.

The moments are random and 56 in all; one at which the process had ended already is not counted, and another is drawn.
"""

# ruff: noqa: F811 - fixtures are named by arguments

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from adapter_store import Store
from tests.hubserver import HubServer
from tests.hubserver.client import hub  # noqa: F401
from tests.hubserver.content import draft, files_of, learn

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these processes start by fork")

PETS = "hf://me/pets"


def killed_after(seconds: float, act, *arguments) -> bool:
    """Run `act` in a process of its own and kill it then; whether it was still at work."""
    process = multiprocessing.get_context("fork").Process(target=act, args=arguments)
    process.start()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def timed(act, *arguments) -> float:
    """How long it takes when nobody kills it."""
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=act, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def check_hub(store: Store, hub: HubServer) -> None:
    """Each version is there once; what the killed one left undone is repaired; then nothing is wrong."""
    titles = [title.partition(":")[0] for _, _, title, _ in hub.repos["me/pets"].log()]
    assert titles == [f"v{n}" for n in range(len(titles) - 1, 0, -1)] + ["initial commit"]
    store.repair(PETS)
    assert store.verify(PETS) == []


def push(root: Path) -> None:
    Store(root).push("pets", PETS)


def test_kill_9_in_a_push(hub, tmp_path):
    """At fourteen moments: the version is on the Hub or it is not, and the same push again brings it there once."""
    store = Store(tmp_path / "mine")
    learn(store)
    push(store.root)
    learn(store)
    whole = timed(push, store.root)
    moments, killed, number = random.Random(1), 0, 2
    while killed < 14:
        number += 1
        store.commit("pets", files_of(number), draft(2), expected_head=number - 1)
        killed += killed_after(moments.uniform(0, whole), push, store.root)
        store.push("pets", PETS)
        assert store.head(PETS) == number
        assert store.version(f"{PETS}@v{number}").document == store.version(f"pets@v{number}").document
    check_hub(store, hub)


def pull(root: Path) -> None:
    Store(root).pull(PETS, for_training=True)


@pytest.mark.usefixtures("hub")
def test_kill_9_in_a_pull(tmp_path, monkeypatch):
    """At fourteen moments: what is here afterwards is whole, and the same pull again brings the rest."""
    store = Store(tmp_path / "mine")
    learn(store, count=3)
    push(store.root)

    def fresh(number: object) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"cache{number}"))
        return tmp_path / f"other{number}"

    whole = timed(pull, fresh("whole"))
    moments, killed, number = random.Random(2), 0, 0
    while killed < 14:
        number += 1
        root = fresh(number)
        killed += killed_after(moments.uniform(0, whole), pull, root)
        other = Store(root)
        assert other.verify() == []
        pull(root)
        assert other.verify() == []
        version = other.version("pets@v3")
        assert {path: version.read(path) for path in version.paths()} == files_of(3)


def rollback(root: Path) -> None:
    Store(root).rollback(f"{PETS}@v1")


def test_kill_9_in_a_rollback(hub, tmp_path):
    """At fourteen moments: the older version is the head once more or it is not, and the next rollback works."""
    store = Store(tmp_path / "mine")
    learn(store, count=2)
    push(store.root)
    whole = timed(rollback, store.root)
    moments, killed, tried, first = random.Random(3), 0, 0, store.head(PETS)
    while killed < 14:
        before = store.head(PETS)
        killed += killed_after(moments.uniform(0, whole), rollback, store.root)
        tried += 1
        # what a killed process had sent may land in a later round
        assert before <= store.head(PETS) <= first + tried
    rollback(store.root)
    version = store.version(PETS)
    assert {path: version.read(path) for path in version.paths()} == files_of(1)
    check_hub(store, hub)


def collect(root: Path) -> None:
    Store(root).plan_gc().execute()


def test_kill_9_in_a_gc(tmp_path):
    """At fourteen moments: nothing that a version needs is gone, and the next gc takes what is left."""
    store = Store(tmp_path / "mine")
    learn(store, count=2)
    blobs = tmp_path / "mine" / "blobs"

    def litter() -> None:
        for number in range(300):
            (blobs / f"{number:064x}").write_bytes(b"garbage")

    litter()
    whole = timed(collect, store.root)
    moments, killed = random.Random(4), 0
    while killed < 14:
        litter()
        killed += killed_after(moments.uniform(0, whole), collect, store.root)
        assert store.verify() == []
        collect(store.root)
        assert store.plan_gc().garbage == ()
        assert store.verify() == []
    assert store.version("pets").read("README.md") == files_of(2)["README.md"]
