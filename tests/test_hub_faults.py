"""Laws of a bad day on the Hub: no version is lost, doubled or half there, and every message names the way out."""

# ruff: noqa: F811, ARG001 - fixtures are named by arguments

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from msgspec.structs import replace

from adapter_store import Store, hub_client, hub_publish
from cpserve.errors import CpserveError, IntegrityError, StoreError
from cpserve.manifest import Manifest
from tests.hubserver import Fault, HubServer
from tests.hubserver.app import OTHER_TOKEN
from tests.hubserver.client import environment, hub  # noqa: F401
from tests.hubserver.content import files_of, learn
from tests.hubserver.faults import flipped

PETS = "hf://me/pets"
COMMIT = r"/api/models/me/pets/commit/"
LARGE = r"/me/pets/large/"
SMALL = r"/me/pets/resolve/[^/]+/README.md"


@pytest.fixture
def store(tmp_path: Path, hub: HubServer) -> Store:
    """A store with `pets@v1` pushed and v2 yet to be pushed."""
    store = Store(tmp_path / "mine")
    learn(store)
    store.push("pets", PETS)
    learn(store)
    return store


def check_chain(store: Store, hub: HubServer, count: int) -> None:
    """So many versions, each once, all whole, each with its tag."""
    titles = [title for _, _, title, _ in hub.repos["me/pets"].log()]
    assert [title.partition(":")[0] for title in titles] == [f"v{n}" for n in range(count, 0, -1)] + ["initial commit"]
    assert store.verify(PETS) == []


def somebody_commits(hub: HubServer) -> None:
    repo = hub.repos["me/pets"]
    repo.commit(None, [("notes.txt", os.urandom(8))], "notes")


TRANSIENT = {
    "another commit in progress": Fault("POST", COMMIT, times=2, status=409),
    "too many requests": Fault("POST", COMMIT, times=2, status=429, headers={"Retry-After": "1"}),
    "an error before the commit": Fault("POST", COMMIT, times=2, status=500),
    "an error after the commit": Fault("POST", COMMIT, status=500, after=True),
    "a gateway that gives up after the commit": Fault("POST", COMMIT, status=504, after=True),
    "a moved parent": Fault("POST", COMMIT, times=3, status=412),
    "a commit that landed and is denied": Fault("POST", COMMIT, status=412, after=True),
    "an answer cut off after the commit": Fault("POST", COMMIT, status=502, after=True),
    "a busy list of references": Fault("GET", "/refs", times=3, status=503),
    "a busy upload": Fault("PUT", "/upload/", times=2, status=500),
    "a tag that needs two tries": Fault("POST", "/tag/", times=2, status=500),
    "a tag that was set and denied": Fault("POST", "/tag/", status=500, after=True),
    "a busy first question": Fault("GET", "/api/models/me/pets$", times=2, status=503),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
def test_what_passes_is_waited_for(store, hub, fault):
    """Whatever the Hub answers for a while, before or after it did what was asked: the version is there once."""
    hub.faults.add(fault)
    assert store.push("pets", PETS).versions == (2,)
    check_chain(store, hub, 2)


LASTING = {
    "409": (Fault("POST", COMMIT, times=99, status=409), "under way"),
    "412": (Fault("POST", COMMIT, times=99, status=412), "others keep committing"),
    "429": (Fault("POST", COMMIT, times=99, status=429), "too many requests"),
    "500": (Fault("POST", COMMIT, times=99, status=500), "trouble of its own"),
    "403": (Fault("POST", COMMIT, times=99, status=403), "the token may not"),
    "refs": (Fault("GET", "/refs", times=99, status=500), "trouble of its own"),
    "upload": (Fault("PUT", "/upload/", times=99, status=503), "trouble of its own"),
    "preupload": (Fault("POST", "/preupload/", times=99, status=500), "trouble of its own"),
}


@pytest.mark.parametrize(("fault", "words"), LASTING.values(), ids=LASTING)
def test_what_lasts_is_an_error_and_the_next_push_goes_on(store, hub, fault, words):
    """Patience is bounded; the error says what to do, nothing is half there, and the same command works afterwards."""
    hub.faults.add(fault)
    with pytest.raises(StoreError, match=words) as caught:
        store.push("pets", PETS)
    assert caught.value.hint
    hub.faults.clear()
    assert [m.version for m in store.log(PETS)] == [1]
    assert store.push("pets", PETS).versions == (2,)
    check_chain(store, hub, 2)


def test_an_alias_is_what_the_hub_says_now(store, hub):
    """Where an alias was moved and the file behind it is slow to come, nobody gets what it stood for before."""
    store.push("pets", PETS)
    store.set_alias(PETS, "prod", 1)
    assert store.version(f"{PETS}@prod").manifest.version == 1
    store.set_alias(PETS, "prod", 2)
    hub.faults.add(Fault("HEAD", "/resolve/prod/", times=100, status=503))
    assert store.version(f"{PETS}@prod").manifest.version == 2
    hub.faults.clear()
    hub.faults.add(Fault("HEAD", "/resolve/v2/", times=2, status=503))
    assert store.version(f"{PETS}@v2").manifest.version == 2


def test_an_alias_that_was_taken_away_and_denied_is_moved(store, hub):
    """To move one it is removed first; that the answer is lost loses neither the alias nor the way."""
    store.push("pets", PETS)
    store.set_alias(PETS, "prod", 1)
    hub.faults.add(Fault("DELETE", "/tag/", status=500, after=True))
    store.set_alias(PETS, "prod", 2)
    assert store.aliases(PETS) == {"prod": 2}


def test_a_tag_that_cannot_be_set_loses_no_version(store, hub):
    """The version is stored and says so; its tag is set by repair, or by the next push."""
    hub.faults.add(Fault("POST", "/tag/", times=99, status=403))
    with pytest.raises(StoreError, match="is stored, but its tag is not set") as caught:
        store.push("pets", PETS)
    assert "--repair" in caught.value.hint
    hub.faults.clear()
    assert store.version(f"{PETS}@v2").document == store.version("pets@v2").document
    assert store.push("pets", PETS).versions == ()
    check_chain(store, hub, 2)


def test_somebody_else_between_looking_and_committing(store, hub):
    """A commit that is no version gets out of the way; each try is made anew on top of what is there."""
    hub.faults.add(Fault("POST", COMMIT, times=3, first=lambda: somebody_commits(hub)))
    assert store.push("pets", PETS).versions == (2,)
    assert store.verify(PETS) == []
    hub.faults.add(Fault("POST", COMMIT, times=3, first=lambda: somebody_commits(hub)))
    assert store.rollback(f"{PETS}@v1").manifest.version == 3
    assert store.verify(PETS) == []


@pytest.mark.parametrize("what", ["large", "small", "manifest"])
@pytest.mark.parametrize("harm", [flipped, lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)])
def test_corruption_of_the_same_length_is_named_and_never_used(store, hub, tmp_path, what, harm):
    """The client lets it pass; the manifest does not. A second look helps where only the way was bad."""
    path = {"large": LARGE, "small": SMALL, "manifest": "/cpserve.json"}[what]
    other = Store(tmp_path / "other")
    hub.faults.add(Fault("GET", path, times=99, body=harm))
    with pytest.raises(IntegrityError) as caught:
        other.pull(PETS)
    assert caught.value.path.endswith({"small": "README.md", "manifest": "cpserve.json", "large": ".safetensors"}[what])
    assert caught.value.path in str(caught.value)
    assert caught.value.hint
    assert other.names() == []
    hub.faults.clear()
    assert other.pull(PETS).versions == (1,)
    assert other.verify() == []


def test_a_cut_download_goes_on(store, hub, tmp_path, monkeypatch):
    """A connection that breaks off in the middle of a file is taken up again where it broke, and the file is whole."""
    other = Store(tmp_path / "other")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)  # the client writes, and goes on, by these: 10 MiB
    hub.faults.add(Fault("GET", LARGE, times=3, cut=5_000, piece=1_000))  # the first file is shorter
    assert other.pull(PETS, for_training=True).versions == (1,)
    assert {path: other.version("pets").read(path) for path in other.version("pets").paths()} == files_of(1)
    assert sorted(asked.begin for asked in hub.asked if LARGE in asked.path and asked.begin) == [5_000, 10_000]


@pytest.mark.parametrize("path", [LARGE, SMALL, "/cpserve.json"], ids=["large", "small", "manifest"])
@pytest.mark.parametrize("cut", [0, 5])
def test_a_download_that_always_breaks_off_is_an_error(store, hub, tmp_path, monkeypatch, path, cut):
    """Nothing of a pull that cannot end is stored; the next one asks only for what did not arrive."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    other = Store(tmp_path / "other")
    hub.faults.add(Fault("GET", path, times=999, cut=cut))
    with pytest.raises(StoreError) as caught:
        other.pull(PETS)
    assert caught.value.hint
    assert other.names() == []
    hub.faults.clear()
    arrived = {each.name for each in (tmp_path / "cache").rglob("snapshots/*/**/*") if each.is_file()}
    before = len(hub.downloads())
    assert other.pull(PETS).versions == (1,)
    again = {each.rpartition("/")[2] for each in hub.downloads()[before:]}
    assert not again & (arrived - {"cpserve.json"})


def test_a_slow_body_is_waited_for_and_a_dead_one_is_not(store, hub, tmp_path, monkeypatch):
    """Bytes that trickle are fine; a connection on which nothing comes any more is given up."""
    other = Store(tmp_path / "other")
    hub.faults.add(Fault("GET", LARGE, times=9, stall_s=0.02, piece=2_000))
    assert other.pull(PETS).versions == (1,)
    store.push("pets", PETS)
    hub.faults.clear()
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults.add(Fault("GET", LARGE, times=999, stall_s=1.0, piece=100))
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "third").pull(PETS)
    assert caught.value.hint
    assert Store(tmp_path / "third").names() == []


def test_who_may_not_read_is_told_all_that_it_can_mean(store, hub, tmp_path, monkeypatch):
    """Missing, private and a wrong token look alike to the client, so one message names all three; gated says so."""
    other = Store(tmp_path / "other")
    for token in (OTHER_TOKEN, "hf_wrong", None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        for repo in ("me/pets", "me/nothing"):
            with pytest.raises(CpserveError, match="does not exist, is private, or the token is wrong") as caught:
                Store(other.root).pull(f"hf://{repo}")
            assert "HF_TOKEN" in caught.value.hint
        with pytest.raises(CpserveError) as caught:
            Store(store.root).push("pets", "hf://me/new")
        assert caught.value.hint
    assert "me/new" not in hub.repos
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    hub.repos["me/pets"].private = False
    with pytest.raises(StoreError, match="may not do this"):
        Store(store.root).push("pets", PETS)
    hub.repos["me/pets"].gated = True
    with pytest.raises(StoreError, match="gated") as caught:
        Store(other.root).pull(PETS)
    assert hub.endpoint in caught.value.hint


def test_nobody_there(store, monkeypatch):
    """A dead port is an error that names the address."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for act in (
        lambda at: at.push("pets", PETS),
        lambda at: at.pull("hf://me/other@v1", "other"),
        lambda at: at.log(PETS),
        lambda at: at.rollback("hf://me/other@v1"),
    ):
        with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9") as caught:
            act(Store(store.root))
        assert caught.value.hint


def test_words_that_claim_a_version_are_no_version(store, hub, tmp_path):
    """A commit that quotes a version's message and holds none, as a revert does, is in nobody's way."""
    repo, document = hub.repos["me/pets"], store.version("pets@v1").manifest.dump()
    repo.commit(None, [("cpserve.json", None)], 'Revert "v1"', f"manifest sha256 {'0' * 64}")
    repo.commit(None, [("cpserve.json", document)], "back")
    assert store.push("pets", PETS).versions == (2,)
    assert store.verify(PETS) == []
    assert [v.version for v in Store(tmp_path / "other").log(PETS)] == [2, 1]


def test_a_hub_without_xet_is_a_sentence(store, hub, monkeypatch):
    """Where the client insists on Xet and the Hub has none, the message names the switch."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(StoreError, match="Xet") as caught:
        store.push("pets", PETS)
    assert "HF_HUB_DISABLE_XET=1" in caught.value.hint
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert store.push("pets", PETS).versions == (2,)
    check_chain(store, hub, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.usefixtures("store")
def test_a_full_disk_stops_a_pull_before_and_while_it_writes(small_disk, hub, monkeypatch):
    """What does not fit is not even fetched; a disk that turns out to be full leaves the store as it was."""
    other = Store(small_disk / "home")
    with pytest.raises(StoreError, match="are free") as caught:
        other.pull(PETS, for_training=True)
    assert caught.value.hint
    assert not any(LARGE in path for path in hub.downloads())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    with pytest.raises(StoreError, match="disk is full") as caught:
        other.pull(PETS, for_training=True)
    assert caught.value.hint
    assert other.names() == other.verify() == []


@pytest.mark.usefixtures("store")
def test_a_full_disk_below_the_clients_cache_is_said_to_be_full(small_disk, hub, tmp_path, monkeypatch):
    """The cache may lie on another disk than the store: one that is full stores nothing, and the way out works."""
    other = Store(tmp_path / "other")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk / "cache"))
    with pytest.raises(StoreError, match="are free") as caught:
        other.pull(PETS, for_training=True)
    assert caught.value.hint
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    with pytest.raises(StoreError, match="disk is full") as caught:
        other.pull(PETS, for_training=True)
    assert caught.value.hint
    assert other.names() == []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "roomy"))
    assert other.pull(PETS, for_training=True).versions == (1,)


def hostile(manifest: Manifest, **file: object) -> bytes:
    """A manifest of v1 whose first file is told otherwise."""
    first = replace(manifest.files[0], **file)
    return replace(manifest, files=(first, *manifest.files[1:])).dump()


HOSTILE = {
    "a path that climbs": lambda m: hostile(m, path="../../../../../../../../etc/hostname"),
    "an absolute path": lambda m: hostile(m, path="/etc/hostname"),
    "the manifest as one of its files": lambda m: hostile(m, path="cpserve.json"),
    "two paths that meet": lambda m: hostile(m, path=m.files[1].path.upper()),
    "a file of a terabyte": lambda m: hostile(m, size=1 << 40),
    "a file that is larger on the Hub": lambda m: hostile(m, size=3),
    "a file that is not there": lambda m: hostile(m, path="nothing.png"),
    "another number": lambda m: replace(m, version=7).dump(),
    "no JSON": lambda _: b"{",
    "a manifest without an end": lambda m: m.dump() + b" " * (5 << 20),
}


@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_repository_is_refused_before_a_file_is_fetched(store, hub, tmp_path, made):
    """Whether it is pulled, looked into or checked out: one sentence, nothing fetched, nothing written."""
    repo = hub.create("me/bad")
    small = [
        (entry.path, store.version("pets@v1").read(entry.path)) for entry in store.version("pets@v1").manifest.files
    ]
    document = made(store.version("pets@v1").manifest)
    repo.tag("v1", repo.commit(None, [*small, ("cpserve.json", document)], "v1: dog"))
    other, bad = Store(tmp_path / "other"), "hf://me/bad@v1"
    for act in (
        lambda: other.pull(bad),
        lambda: other.checkout(bad, tmp_path / "out"),
        lambda: [other.version(bad).read(path) for path in other.version(bad).paths()],
    ):
        with pytest.raises(StoreError) as caught:
            act()
        assert caught.value.hint
    assert {path.rpartition("/")[2] for path in hub.downloads() if "/bad/" in path} <= {"cpserve.json"}
    assert not (tmp_path / "out").exists()
    assert not other.root.exists()


WRITER = """
import sys, time
from pathlib import Path
from adapter_store import Store
from cpserve.manifest import Manifest
root, draft, mark, go = sys.argv[1:]
while not Path(go).exists():
    time.sleep(0.01)
store = Store(Path(root))
files = {"README.md": mark.encode(), "pytorch_lora_weights.safetensors": mark.encode() * 1000}
store.commit("hf://me/pets", files, Manifest.parse(Path(draft).read_bytes()), expected_head=None)
"""


def test_eight_writers_at_once_make_eight_versions(store, hub, tmp_path):
    """Eight processes import at the same moment: each version lands exactly once, in one verified chain."""
    (tmp_path / "draft").write_bytes(store.version("pets@v1").document)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / f"{i}", tmp_path / "draft", f"mark {i}", tmp_path / "go"],
            env={**os.environ, **environment(hub, tmp_path / f"cache{i}")},
            stderr=subprocess.PIPE,
        )
        for i in range(8)
    ]
    (tmp_path / "go").touch()
    for writer in writers:
        assert writer.wait() == 0, writer.stderr.read().decode()
    log = store.log(PETS)
    assert [m.version for m in log] == list(range(9, 0, -1))
    marks = {store.version(f"{PETS}@v{n}").read("README.md") for n in range(2, 10)}
    assert marks == {b"mark %d" % i for i in range(8)}
    check_chain(store, hub, 9)


def test_patience_has_an_end():
    """The waits are bounded: some seconds for a busy Hub, and so many times that somebody else may be first."""
    assert sum(hub_client.waits()) < 30
    assert hub_publish.OVERTAKEN < 100
