"""Laws of the local store: versions are immutable, numbered, chained by hash, and checked whenever they are read."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import threading
from datetime import datetime
from unittest import mock

import pytest
from msgspec.structs import replace

from adapter_store.atomic import locked
from adapter_store.layout import check_paths, is_training_only
from adapter_store.store import Store
from adapter_store.version import sha256
from cpserve.errors import IntegrityError, RefError, StoreError
from cpserve.manifest import SCHEMA, BaseEntry, ConceptEntry, Fingerprint, Manifest, Parent

FILES = {
    "README.md": b"# card\n",
    "pytorch_lora_weights.safetensors": bytes(range(256)) * 40,
    "embeddings/dog.safetensors": b"dog" * 100,
    "training/fisher.safetensors": b"fisher" * 100,
}


def draft(*concepts, **known):
    base = BaseEntry(id="builtin:emoji64", fingerprint=Fingerprint(architecture="0" * 64, weights="1" * 64))
    entries = tuple(
        ConceptEntry(name=name, token=f"<{name}>", class_word=None, templates=("a {}",), since=since, pictures=6)
        for name, since in concepts
    )
    return Manifest(base=base, concepts=entries, method="ewc", **known)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


@pytest.fixture
def pets(store):
    """Three versions of `pets`, in which v3 alone has its own weights."""
    store.commit("pets", FILES, draft(("dog", 0), metrics={"dc": 0.5}), expected_head=0)
    store.commit(
        "pets", {**FILES, "embeddings/cat.safetensors": b"cat"}, draft(("dog", 1), ("cat", 0)), expected_head=1
    )
    weights = {"pytorch_lora_weights.safetensors": b"newer"}
    store.commit("pets", {**FILES, **weights}, draft(("dog", 1)), expected_head=2)
    return store


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_constructing_and_asking_touch_no_disk(store, tmp_path):
    """An unused store leaves nothing behind, and has nothing."""
    assert store.names() == []
    assert store.head("pets") == 0
    assert store.verify() == []
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_the_environments_or_the_users(tmp_path, monkeypatch):
    """`CPSERVE_HOME` is the root; without it, a folder in the user's home."""
    monkeypatch.setenv("CPSERVE_HOME", str(tmp_path / "a"))
    Store().commit("pets", {}, draft(), expected_head=0)
    monkeypatch.delenv("CPSERVE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "b"))
    Store().commit("pets", {}, draft(), expected_head=0)
    assert (tmp_path / "a" / "adapters").is_dir()
    assert (tmp_path / "b" / ".local" / "share" / "cpserve" / "adapters").is_dir()


def test_a_version_gives_back_what_was_committed(store):
    """Bytes come back equal, and the store fills name, number, time, lineage, files and `since`."""
    first = store.commit("pets", FILES, draft(("dog", 0)), expected_head=0)
    second = store.commit("pets", FILES, draft(("dog", 1), ("cat", 0)), expected_head=1)
    assert {path: first.read(path) for path in first.paths()} == FILES
    assert (second.manifest.name, second.manifest.version) == ("pets", 2)
    assert [concept.since for concept in second.manifest.concepts] == [1, 2]
    assert first.manifest.previous is None
    assert second.manifest.previous == first.pin == Parent(version=1, manifest_sha256=sha256(first.manifest.dump()))
    age = datetime.now().astimezone() - datetime.fromisoformat(second.manifest.created)
    assert -2 < age.total_seconds() < 60
    assert second == store.version("pets") == store.version("pets@latest") == store.version("pets@v2")
    assert Manifest.parse(second.document) == second.manifest


@pytest.mark.usefixtures("pets")
def test_equal_contents_are_stored_once(tmp_path):
    """A blob is kept once however many versions have it."""
    contents = {*FILES.values(), b"cat", b"newer"}
    assert len(names_in(tmp_path / "home" / "blobs")) == len(contents) + 3


def test_versions_are_immutable(pets, tmp_path):
    """No later act changes a byte of what is stored: it only adds, or moves an alias."""
    before = snapshot(tmp_path / "home")
    pets.commit("pets", {"a": b"1"}, draft(), expected_head=3)
    pets.rollback("pets@v1")
    pets.set_alias("pets", "prod", 2)
    assert before.items() <= snapshot(tmp_path / "home").items()


def test_a_commit_from_an_old_head_writes_nothing(pets, tmp_path):
    """When the head has moved on, the loser is told from where to learn again, and nothing is stored."""
    before = snapshot(tmp_path / "home")
    for expected in (0, 2, 4):
        with pytest.raises(StoreError, match="its head is v3") as caught:
            pets.commit("pets", {"a": b"1"}, draft(), expected_head=expected)
        assert "--restart" in caught.value.hint
    assert snapshot(tmp_path / "home") == before
    assert pets.commit("pets", {"a": b"1"}, draft(), expected_head=None).manifest.version == 4


def test_the_log_is_newest_first_and_verified(pets):
    """Each manifest pins the one before it."""
    log = pets.log("pets")
    assert [manifest.version for manifest in log] == [3, 2, 1]
    assert [m.previous.manifest_sha256 for m in log[:2]] == [sha256(m.dump()) for m in log[1:]]


def test_a_rollback_is_a_new_version_with_the_old_content(pets, tmp_path):
    """Files, settings, metrics and origin are the old version's; number and lineage are new; no file is written."""
    pets.set_alias("pets", "good", 1)
    blobs = names_in(tmp_path / "home" / "blobs")
    old, new = pets.version("pets@v1"), pets.rollback("pets@good")
    assert new.manifest.version == pets.head("pets") == 4
    assert new.manifest.previous == pets.version("pets@v3").pin
    own = {"version": 0, "created": "", "previous": None}
    assert replace(new.manifest, **own) == replace(old.manifest, **own)
    assert len(names_in(tmp_path / "home" / "blobs") - blobs) == 1
    assert len(pets.log("pets")) == 4


def test_a_rollback_to_a_damaged_version_is_refused(pets, tmp_path):
    """What cannot be read is not made the head."""
    blob_of(tmp_path, pets, 1, "README.md").unlink()
    with pytest.raises(IntegrityError, match=r"README\.md"):
        pets.rollback("pets@v1")
    assert pets.head("pets") == 3


def test_aliases_move_and_resolve(pets):
    """An alias stands for one version at a time."""
    pets.set_alias("pets", "prod", 1)
    pets.set_alias("pets", "test", 2)
    pets.set_alias("pets", "prod", 3)
    assert pets.aliases("pets") == {"prod": 3, "test": 2}
    assert pets.version("pets@prod") == pets.version("pets@v3")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda store: store.version("pets@v4"), RefError),
        (lambda store: store.version("cats"), RefError),
        (lambda store: store.version("pets@prod"), RefError),
        (lambda store: store.version("hf://me/pets"), StoreError),
        (lambda store: store.rollback("hf://me/pets@v1"), StoreError),
        (lambda store: store.log("cats"), RefError),
        (lambda store: store.verify("cats"), RefError),
        (lambda store: store.head("../pets"), RefError),
        (lambda store: store.commit("../pets", {}, draft(), expected_head=0), RefError),
        (lambda store: store.set_alias("pets", "latest", 1), RefError),
        (lambda store: store.set_alias("pets", "v1", 1), RefError),
        (lambda store: store.set_alias("pets", "beef", 1), RefError),
        (lambda store: store.set_alias("pets", "prod", 4), RefError),
        (lambda store: store.version("pets").read("nothing"), StoreError),
    ],
)
def test_what_does_not_exist_is_refused_with_a_hint(pets, tmp_path, call, error):
    """A wrong name, number, alias or file is an error with a hint, and changes nothing."""
    before = snapshot(tmp_path / "home")
    with pytest.raises(error) as caught:
        call(pets)
    assert caught.value.hint
    assert snapshot(tmp_path / "home") == before


@pytest.mark.parametrize(
    "path",
    ["", "/a", "../a", "a/../b", "./a", "a//b", "a/", "a\\b", "C:a", "a\x00", "a\n", "\ud800", "x" * 201,
     "cpserve.json", "CPSERVE.json"],
)  # fmt: skip
def test_hostile_paths_are_refused(store, tmp_path, path):
    """A path that could leave the folder, or stand for the manifest, stores nothing."""
    with pytest.raises(StoreError):
        store.commit("pets", {"ok": b"", path: b"x"}, draft(), expected_head=0)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("pair", [("a", "A"), ("caf\u00e9", "cafe\u0301"), ("a", "a/b"), ("A/b", "a")])
def test_paths_that_meet_are_refused(pair):
    """Two paths that some file system could not keep apart are refused."""
    with pytest.raises(StoreError):
        check_paths(pair)


def test_only_the_training_folder_is_training_only():
    """What serving needs is everything outside `training/`."""
    assert [path for path in sorted(FILES) if is_training_only(path)] == ["training/fisher.safetensors"]
    assert not is_training_only("embeddings/training")


def test_a_checkout_is_an_ordinary_folder(pets, tmp_path):
    """It has the version's files and its manifest; what only training needs comes on request."""
    folder = pets.checkout("pets@v1", tmp_path / "deep" / "out")
    document = pets.version("pets@v1").document
    serving = {path: data for path, data in FILES.items() if not path.startswith("training/")}
    assert snapshot(folder) == {**serving, "cpserve.json": document}
    (tmp_path / "empty").mkdir()
    everything = pets.checkout("pets@v1", tmp_path / "empty", for_training=True)
    assert snapshot(everything) == {**FILES, "cpserve.json": document}
    assert names_in(tmp_path / "deep") == {"out"}


def test_a_checkout_never_overwrites_and_never_stops_half_way(pets, tmp_path):
    """A target that is not empty is refused, and a damaged file leaves no folder."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    for target in ("full", "file"):
        with pytest.raises(StoreError, match="not an empty folder"):
            pets.checkout("pets", tmp_path / target)
    blob_of(tmp_path, pets, 1, "pytorch_lora_weights.safetensors").write_bytes(b"bad")
    with pytest.raises(IntegrityError, match="pytorch_lora_weights"):
        pets.checkout("pets@v1", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "home"]


def blob_of(tmp_path, store, version, path):
    if path == "cpserve.json":
        return tmp_path / "home" / "blobs" / store.version(f"pets@v{version}").pin.manifest_sha256
    entries = store.version(f"pets@v{version}").manifest.files
    return tmp_path / "home" / "blobs" / next(entry.sha256 for entry in entries if entry.path == path)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << place % 8
    path.write_bytes(data)


def test_a_flipped_byte_anywhere_is_named(pets, tmp_path):
    """Whichever blob or version file has a flipped byte, is cut or is missing, verify names the file."""
    home = tmp_path / "home"
    owners = {}
    for version in (1, 2, 3):
        for path in (*pets.version(f"pets@v{version}").paths(), "cpserve.json"):
            owners.setdefault(blob_of(tmp_path, pets, version, path), set()).add((f"pets@v{version}", path))
        owners[home / "adapters" / "pets" / f"v{version}"] = {(f"pets@v{version}", "cpserve.json")}
    assert set(owners) >= set((home / "blobs").iterdir())
    harms = (lambda file: flip(file, 1), lambda file: flip(file, -1), lambda file: os.truncate(file, 1), os.unlink)
    for place, (file, expected) in enumerate(owners.items()):
        whole = file.read_bytes()
        for harm in harms[: None if file.parent.name == "blobs" or "v3" not in file.name else 3]:
            harm(file)
            found = pets.verify("pets")
            assert expected <= {(problem.ref, problem.path) for problem in found}, place
            assert all(problem.path in problem.what for problem in found)
            file.write_bytes(whole)
    assert pets.verify() == []


def test_reading_checks_every_byte(pets, tmp_path):
    """Corruption of equal length, a cut and a missing file are each an IntegrityError that names the file."""
    for harm in (lambda file: flip(file, 100), lambda file: os.truncate(file, 5), os.unlink):
        harm(blob_of(tmp_path, pets, 1, "embeddings/dog.safetensors"))
        with pytest.raises(IntegrityError) as caught:
            pets.version("pets@v1").read("embeddings/dog.safetensors")
        assert caught.value.path == "embeddings/dog.safetensors"
        assert caught.value.hint


def test_storing_the_same_bytes_again_mends_a_damaged_blob(pets, tmp_path):
    """A blob that is not whole is never taken for one that is there."""
    flip(blob_of(tmp_path, pets, 1, "README.md"), 3)
    pets.commit("other", {"README.md": FILES["README.md"]}, draft(), expected_head=0)
    assert pets.verify() == []


def test_what_is_damaged_while_a_rollback_waits_is_not_stored(pets, tmp_path):
    """A version is read under the same lock under which it is stored again."""
    caught = []

    def roll_back():
        try:
            pets.rollback("pets@v1")
        except IntegrityError as error:
            caught.append(error)

    waiting = threading.Thread(target=roll_back)
    with locked(tmp_path / "home" / "lock"):
        waiting.start()
        waiting.join(0.5)
        blob_of(tmp_path, pets, 1, "README.md").unlink()
    waiting.join()
    assert [error.path for error in caught] == ["README.md"]
    assert pets.head("pets") == 3


def test_a_damaged_manifest_says_how_to_get_rid_of_it(pets, tmp_path):
    """Whatever needs it names it and two ways out."""
    flip(tmp_path / "home" / "blobs" / pets.version("pets@v2").pin.manifest_sha256, 1)
    for ask in (lambda: pets.version("pets@v2"), pets.plan_gc, lambda: pets.log("pets")):
        with pytest.raises(IntegrityError, match="pets@v2") as caught:
            ask()
        assert "pull hf://USER/REPO@v2 --as pets" in caught.value.hint
        assert "adapters delete pets" in caught.value.hint
    pets.delete("pets")
    assert pets.names() == []


def test_a_broken_lineage_is_found(pets, tmp_path):
    """A version put in another's place, left out, or renumbered breaks the chain, in the log and in verify."""
    adapter = tmp_path / "home" / "adapters" / "pets"
    for harm in (
        lambda: shutil.copy(adapter / "v1", adapter / "v2"),
        (adapter / "v2").unlink,
        lambda: shutil.copy(adapter / "v3", adapter / "v4"),
    ):
        whole = snapshot(adapter)
        harm()
        with pytest.raises(IntegrityError):
            pets.log("pets")
        assert pets.verify("pets")
        shutil.rmtree(adapter)
        adapter.mkdir()
        for name, data in whole.items():
            (adapter / name).write_bytes(data)
    assert pets.verify() == []


def test_a_rewritten_version_is_found_by_the_next_one(pets, tmp_path):
    """A whole, well-formed manifest in an older one's place is not the one that the next version follows."""
    other = Store(tmp_path / "other")
    forged = other.commit("pets", FILES, draft(("dog", 0), metrics={"dc": 0.9}), expected_head=0)
    (tmp_path / "home" / "blobs" / forged.pin.manifest_sha256).write_bytes(forged.document)
    shutil.copy(tmp_path / "other" / "adapters" / "pets" / "v1", tmp_path / "home" / "adapters" / "pets" / "v1")
    with pytest.raises(IntegrityError, match="not the one that v2 follows"):
        pets.log("pets")
    assert [(problem.ref, problem.path) for problem in pets.verify()] == [("pets@v2", "cpserve.json")]


def plant(home, number, manifest):
    """Put a manifest in as version N with its right hash, as only a program that is not ours would."""
    document = manifest if isinstance(manifest, bytes) else manifest.dump()
    digest = hashlib.sha256(document).hexdigest()
    (home / "blobs" / digest).write_bytes(document)
    (home / "adapters" / "pets" / f"v{number}").write_text(f"{digest}\n")


def test_a_version_that_follows_none_or_is_newer_than_this_program_is_named(pets, tmp_path):
    """A head without its lineage, or of a later schema, is whole by its hash and still refused, in words."""
    good = pets.version("pets@v3")
    plant(tmp_path / "home", 3, replace(good.manifest, previous=None))
    assert "does not follow" in pets.verify()[0].what
    with pytest.raises(IntegrityError, match="does not follow"):
        pets.log("pets")
    plant(
        tmp_path / "home",
        3,
        good.document.replace(b'"schema_version": %d' % SCHEMA, b'"schema_version": %d' % (SCHEMA + 1)),
    )
    with pytest.raises(IntegrityError, match="schema_version") as caught:
        pets.version("pets")
    assert "upgrade" in caught.value.hint


def test_a_store_that_is_held_is_an_error_not_a_wait_for_ever(pets, tmp_path):
    """Whoever cannot get the lock in time is told who holds what, and readers never wait."""
    with mock.patch("adapter_store.atomic.LOCK_TIMEOUT_S", 0.05), locked(tmp_path / "home" / "lock"):
        assert pets.version("pets").manifest.version == 3
        failures = []

        def other():
            try:
                pets.commit("pets", {}, draft(), expected_head=3)
            except StoreError as error:
                failures.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another process has held" in failures[0]
    assert pets.head("pets") == 3


def test_a_damaged_alias_is_found_and_harms_no_other(pets, tmp_path):
    """Verify names an alias that stands for no version; the other references still work."""
    pets.set_alias("pets", "prod", 1)
    pets.set_alias("pets", "test", 1)
    (tmp_path / "home" / "adapters" / "pets" / "aliases" / "prod").write_bytes(b"v9\n")
    assert [(problem.ref, problem.path) for problem in pets.verify()] == [("pets@prod", "aliases/prod")]
    with pytest.raises(IntegrityError):
        pets.version("pets@prod")
    assert pets.version("pets@test").manifest.version == 1


def test_what_desktops_and_killed_processes_leave_is_harmless(pets, tmp_path):
    """Stray files are ignored, and temporary ones swept at the next commit."""
    home = tmp_path / "home"
    for stray in (home / "adapters" / ".DS_Store", home / "adapters" / "pets" / ".DS_Store"):
        stray.write_bytes(b"x")
    (home / "tmp" / "of a killed process").write_bytes(b"half")
    assert pets.names() == ["pets"]
    assert pets.verify() == []
    pets.commit("pets", {}, draft(), expected_head=3)
    assert names_in(home / "tmp") == set()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_version_and_gives_the_space_back(small_disk):
    """A commit that does not fit is a StoreError, leaves no trace, and a smaller one fits afterwards."""
    store = Store(small_disk / "home")
    store.commit("pets", {"a": bytes(50_000)}, draft(), expected_head=0)
    before = snapshot(small_disk)
    with pytest.raises(StoreError, match="disk is full") as caught:
        store.commit("pets", {"b": os.urandom(100_000), "c": os.urandom(200_000)}, draft(), expected_head=1)
    assert caught.value.hint
    assert snapshot(small_disk) == before
    for number in range(3):
        store.checkout("pets", small_disk / f"out{number}")
    with pytest.raises(StoreError, match="disk is full"):
        store.checkout("pets", small_disk / "out3")
    assert names_in(small_disk) == {"home", "out0", "out1", "out2"}
    for path in small_disk.glob("out*"):
        shutil.rmtree(path)
    assert store.commit("pets", {"b": os.urandom(100_000)}, draft(), expected_head=1).manifest.version == 2
    assert store.verify() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_whatever_the_system_refuses_is_a_store_error(pets, tmp_path, operation, code):
    """An error of any file operation is a StoreError with a hint, after which the store is as before."""
    before = snapshot(tmp_path / "home")
    with mock.patch(f"os.{operation}", side_effect=OSError(code, "no")), pytest.raises(StoreError) as caught:
        pets.commit("pets", {"a": b"fresh"}, draft(), expected_head=3)
    assert caught.value.hint
    assert snapshot(tmp_path / "home") == before


def test_a_disk_that_can_only_be_read_can_be_asked(tmp_path, monkeypatch):
    """Where no lock can be taken nobody can tell whether a training was stopped, and none is named."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "lock")

    store = Store(tmp_path)
    store.run("pets").mkdir(parents=True)
    store.run_lock("pets").touch()
    assert store.unfinished() == ["pets"]
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert store.unfinished() == []
