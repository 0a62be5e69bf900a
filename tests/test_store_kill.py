"""Laws of many processes and sudden death: the old version or the new one, one winner per head, one chain."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest

from adapter_store.store import Store
from cpserve.errors import IntegrityError, StoreError
from cpserve.manifest import BaseEntry, Fingerprint, Manifest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these processes start by fork")

DRAFT = Manifest(
    base=BaseEntry(id="builtin:emoji64", fingerprint=Fingerprint(architecture="0" * 64, weights="1" * 64)),
    concepts=(),
    method="ewc",
)
TOUCHES = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.listdir", "os.rmdir"}


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def files_of(version):
    """What version N of the killed writer holds: a small file, a large one, and one that never changes."""
    noise = random.Random(version).randbytes(300_000)
    return {"README.md": b"v%d" % version, "weights.safetensors": noise, "embeddings/dog.safetensors": b"dog"}


def commit_next(root):
    store = Store(root)
    head = store.head("pets")
    return store.commit("pets", files_of(head + 1), DRAFT, expected_head=head)


def commit_for_ever(root):
    while True:
        commit_next(root)


def check_whole(store):
    """Every version is exactly what was committed, whoever was killed."""
    assert store.verify() == []
    for manifest in store.log("pets"):
        version = store.version(f"pets@v{manifest.version}")
        assert {path: version.read(path) for path in version.paths()} == files_of(version.manifest.version)


def test_kill_9_at_any_moment_leaves_a_whole_store(tmp_path):
    """A writer killed at twenty random moments never leaves a version half written nor the store locked."""
    moments = random.Random(9)
    store = Store(tmp_path)
    began = time.monotonic()
    start(commit_next, tmp_path).join()
    whole = time.monotonic() - began
    for _ in range(20):
        before = store.head("pets")
        writer = start(commit_for_ever, tmp_path)
        time.sleep(moments.uniform(0, 4 * whole))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert store.verify() == []
        assert commit_next(tmp_path).manifest.version == store.head("pets") > before
    check_whole(store)
    assert store.head("pets") > 21  # some of the killed writers' versions did land


def die_at(step, root, act):
    """Run `act`, killed just before its file operation number `step` under `root`."""
    left = [step]

    def hook(event, arguments):
        if event in TOUCHES and any(str(root) in str(argument) for argument in arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    act(Store(root / "home"))


def rollback(store):
    store.rollback("pets@v1")


def learn_and_point(store):
    store.commit("pets", files_of(2), DRAFT, expected_head=1)
    store.set_alias("pets", "prod", 2)


@pytest.mark.parametrize("act", [rollback, learn_and_point])
def test_killed_before_each_of_its_file_operations_an_act_happened_or_did_not(tmp_path, act):
    """For every single file operation: killed before it, the store is whole, as before or as after, and goes on."""
    first = Store(tmp_path / "first" / "home")
    first.commit("pets", files_of(1), DRAFT, expected_head=0)
    first.set_alias("pets", "prod", 1)
    step, survived = 0, False
    while not survived:
        root = tmp_path / str(step)
        shutil.copytree(tmp_path / "first", root)
        store = Store(root / "home")
        process = start(die_at, step, root, act)
        process.join()
        survived = process.exitcode == 0
        assert survived or process.exitcode == -signal.SIGKILL
        assert store.verify() == []
        head = store.head("pets")
        assert head in {1, 2}
        assert store.aliases("pets")["prod"] in {1, head}
        assert store.version(f"pets@v{head}").read("README.md") == (b"v1" if act is rollback else b"v%d" % head)
        assert store.commit("pets", {}, DRAFT, expected_head=head).manifest.version == head + 1
        step += 1
    assert step > 10
    assert head == 2


def test_a_killed_delete_is_said_again(tmp_path):
    """For every single file operation: killed before it, what others share is whole; said twice, nothing else is left."""
    first = Store(tmp_path / "first" / "home")
    for number in (1, 2):
        first.commit("pets", files_of(number), DRAFT, expected_head=number - 1)
    first.set_alias("pets", "prod", 1)
    first.commit("others", {"dog": b"dog"}, DRAFT, expected_head=0)
    shared = {file.sha256 for file in first.version("others").manifest.files} | {
        first.version("others").pin.manifest_sha256
    }
    step, survived = 0, False
    while not survived:
        root = tmp_path / str(step)
        shutil.copytree(tmp_path / "first", root)
        store = Store(root / "home")
        process = start(die_at, step, root, lambda store: store.delete("pets"))
        process.join()
        survived = process.exitcode == 0
        assert store.verify("others") == []
        if (root / "home" / "adapters" / "pets").exists():
            store.delete("pets")
        assert store.names() == ["others"]
        assert {path.name for path in (root / "home" / "blobs").iterdir()} == shared
        step += 1
    assert step > 10


def test_nothing_is_deleted_while_another_is_damaged(tmp_path):
    """What that one shares is not known, so all stays as it is until it is mended or deleted itself."""
    store = Store(tmp_path)
    store.commit("pets", files_of(1), DRAFT, expected_head=0)
    others = store.commit("others", {"dog": b"dog"}, DRAFT, expected_head=0)
    (tmp_path / "blobs" / others.pin.manifest_sha256).write_bytes(b"x")
    with pytest.raises(IntegrityError, match="others"):
        store.delete("pets")
    assert store.verify("pets") == []
    store.delete("others")
    assert store.delete("pets")[0] == 1
    assert not any((tmp_path / "blobs").iterdir())


def test_a_killed_checkout_leaves_no_folder_or_all_of_it(tmp_path):
    """For every single file operation: killed before it, the target does not exist or is complete."""
    version = Store(tmp_path / "first" / "home").commit("pets", files_of(1), DRAFT, expected_head=0)
    step, survived = 0, False
    while not survived:
        root = tmp_path / str(step)
        shutil.copytree(tmp_path / "first", root)
        target = root / "out"
        process = start(die_at, step, root, lambda store, target=target: store.checkout("pets", target))
        process.join()
        survived = process.exitcode == 0
        if target.exists():
            assert {path: (target / path).read_bytes() for path in version.paths()} == files_of(1)
            assert (target / "cpserve.json").read_bytes() == version.document
        step += 1
    assert target.exists()


def race(root, barrier, mark):
    """Exit with 0 for the winner of a head and 3 for who is told that it has moved on."""
    store = Store(root)
    head = store.head("pets")
    barrier.wait()
    try:
        store.commit("pets", {"who": mark}, DRAFT, expected_head=head)
    except StoreError as error:
        os._exit(3 if "moved on" in str(error) else 4)


def test_of_two_commits_from_one_head_exactly_one_wins(tmp_path):
    """Compare-and-swap: in each of ten races one process stores the next version, the other stores nothing."""
    store = Store(tmp_path)
    for number in range(1, 11):
        barrier = multiprocessing.get_context("fork").Barrier(2)
        racers = [start(race, tmp_path, barrier, mark) for mark in (b"a", b"b")]
        for racer in racers:
            racer.join()
        assert sorted(racer.exitcode for racer in racers) == [0, 3]
        winner = b"a" if racers[0].exitcode == 0 else b"b"
        assert store.version("pets").read("who") == winner
        assert store.head("pets") == number
    assert store.verify() == []


def insist(root, barrier, mark):
    store = Store(root)
    barrier.wait()
    for _ in range(100):
        try:
            store.commit("pets", {"who": mark}, DRAFT, expected_head=store.head("pets"))
        except StoreError:
            continue
        return
    os._exit(4)


def test_eight_writers_that_retry_make_one_chain_of_eight(tmp_path):
    """Every writer's version lands exactly once, and the lineage verifies."""
    barrier = multiprocessing.get_context("fork").Barrier(8)
    writers = [start(insist, tmp_path, barrier, b"%d" % number) for number in range(8)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8
    store = Store(tmp_path)
    log = store.log("pets")
    assert [manifest.version for manifest in log] == [8, 7, 6, 5, 4, 3, 2, 1]
    marks = {store.version(f"pets@v{number}").read("who") for number in range(1, 9)}
    assert marks == {b"%d" % number for number in range(8)}
    assert store.verify() == []
