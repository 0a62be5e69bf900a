"""Laws of the store on the Hub, through the real client and over real git: the same versions there as here, byte by byte."""

# ruff: noqa: F811, ARG001 - fixtures are named by arguments

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from adapter_store import Store
from adapter_store.diff import diff
from adapter_store.version import sha256
from cpserve.errors import IntegrityError, RefError, StoreError
from tests.hubserver import HubServer
from tests.hubserver.client import hub  # noqa: F401
from tests.hubserver.content import draft, files_of, learn
from tests.hubserver.repo import ENVIRONMENT, pointer

PETS = "hf://me/pets"


@pytest.fixture
def mine(tmp_path: Path, hub: HubServer) -> Store:
    """A store with three versions of `pets`, pushed."""
    store = Store(tmp_path / "mine")
    learn(store, count=3)
    store.push("pets", PETS)
    return store


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """Somebody else's empty store."""
    return Store(tmp_path / "other")


def content(version):
    return {path: version.read(path) for path in version.paths()}


def test_a_push_is_one_commit_a_version_that_git_itself_shows(mine, hub, tmp_path):
    """A clone by git is whole, shows a commit and a tag for each version, and holds its manifest byte by byte."""
    bare = hub.repos["me/pets"].folder
    subprocess.run(["git", "fsck", "--strict"], cwd=bare, check=True, capture_output=True, env=ENVIRONMENT)
    subprocess.run(["git", "clone", "-q", bare, tmp_path / "clone"], check=True, env=ENVIRONMENT)

    def git(*args):
        done = subprocess.run(["git", *args], cwd=tmp_path / "clone", check=True, capture_output=True, env=ENVIRONMENT)
        return done.stdout

    assert git("log", "--format=%s").decode().splitlines() == [
        "v3: dog, cat, cow",
        "v2: dog, cat",
        "v1: dog",
        "initial commit",
    ]
    assert git("tag", "--sort=refname").decode().split() == ["v1", "v2", "v3"]
    for number in (1, 2, 3):
        version = mine.version(f"pets@v{number}")
        assert git("show", f"v{number}:cpserve.json") == version.document
        assert git("show", f"v{number}:README.md") == files_of(number)["README.md"]
        there = git("ls-tree", "-r", "--name-only", f"v{number}").decode().split()
        assert set(there) == {*version.paths(), "cpserve.json", ".gitattributes"}
        for entry in version.manifest.files:
            if entry.path.endswith(".safetensors"):  # which git-lfs would fetch by what git keeps of it
                assert git("show", f"v{number}:{entry.path}") == pointer(entry.sha256, entry.size)
    assert hub.repos["me/pets"].private


def test_what_is_pulled_is_what_was_pushed(mine, other):
    """Tag, commit, alias and `latest` give the same bytes here and there, and the lineage comes along."""
    mine.set_alias(PETS, "prod", 2)
    commit = mine.version(f"{PETS}@v1").commit
    for at, number in (("v2", 2), ("prod", 2), (commit, 1), (commit[:9], 1), ("latest", 3), ("v3", 3)):
        version = mine.version(f"{PETS}@{at}")
        assert version.document == mine.version(f"pets@v{number}").document
        assert content(version) == files_of(number)
        pulled = other.pull(f"{PETS}@{at}", f"at-{at}", for_training=True).version
        assert (str(pulled), content(pulled)) == (f"at-{at}@v{number}", files_of(number))
    pulled = other.pull(f"{PETS}@v2", "dogs", for_training=True)
    assert pulled.versions == (1, 2)
    assert content(other.version("dogs@v2")) == files_of(2)
    assert other.log("dogs") == [mine.version(f"pets@v{n}").manifest for n in (2, 1)]
    assert other.verify() == []


def test_serving_leaves_what_only_training_needs_on_the_hub(mine, other, hub):
    """A pull fetches no training file unless asked, says how to get it, and fetches only that afterwards."""
    other.pull(PETS)
    kept_back = sha256(files_of(3)["training/fisher.safetensors"])
    assert not any(kept_back in path for path in hub.downloads())
    version = other.version("pets")
    assert version.read("pytorch_lora_weights.safetensors") == files_of(3)["pytorch_lora_weights.safetensors"]
    with pytest.raises(StoreError, match="was not pulled") as caught:
        version.read("training/fisher.safetensors")
    assert (
        caught.value.hint
        == f"fetch it: cpserve adapters pull {PETS}@v3 --as pets --for-training --endpoint {hub.endpoint}"
    )
    with pytest.raises(StoreError, match="was not pulled"):
        other.version("pets@v1").read("README.md")
    assert other.verify() == []
    before = len(hub.downloads())
    assert other.pull(PETS, for_training=True).files == ("training/fisher.safetensors",)
    assert len([p for p in hub.downloads()[before:] if "/large/" in p]) == 1
    assert content(other.version("pets")) == files_of(3)


def test_a_pull_of_what_is_here_downloads_nothing(mine, other, hub):
    """The second pull, and a push of what is there, transfer not one file."""
    other.pull(PETS)
    downloads, uploads = len(hub.downloads()), len(hub.uploaded)
    assert other.pull(PETS).files == ()
    assert mine.push("pets", PETS).versions == ()
    assert (len(hub.downloads()), len(hub.uploaded)) == (downloads, uploads)


def test_a_pinned_version_works_offline(mine, other, monkeypatch):
    """What was read once is found without the Hub: forbidden by the user, or gone."""
    first = content(other.version(f"{PETS}@v2"))
    latest = content(other.version(PETS))
    commit = other.version(f"{PETS}@v2").commit
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    gone = Store(other.root)
    assert content(gone.version(f"{PETS}@v2")) == content(gone.version(f"{PETS}@{commit}")) == first
    with pytest.raises(StoreError, match="cannot be reached"):
        gone.version(PETS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert content(Store(other.root).version(f"{PETS}@v2")) == first
    assert content(Store(other.root).version(PETS)) == latest
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE forbids"):
        gone.version("hf://me/nothing@v1")


def test_a_rollback_uploads_nothing(mine, hub):
    """An older version becomes the head as a new commit; no file of it travels, and history keeps all."""
    uploads, requests = len(hub.uploaded), len(hub.asked)
    version = mine.rollback(f"{PETS}@v1")
    assert len(hub.uploaded) == uploads
    assert not any(asked.method == "PUT" for asked in hub.asked[requests:])
    assert content(version) == files_of(1)
    assert version.manifest.previous == mine.version("pets@v3").pin
    assert [m.version for m in mine.log(PETS)] == [4, 3, 2, 1]
    assert mine.verify(PETS) == []
    tree = {item.path for item in hub.repos["me/pets"].tree("main") if item.kind == "file"}
    assert tree == {*files_of(1), "cpserve.json", ".gitattributes"}
    assert mine.pull(PETS).versions == (4,)


def test_aliases_are_tags_that_move(mine, hub):
    """An alias is set, moved and read on the Hub; a version or a commit cannot be one."""
    mine.set_alias(PETS, "prod", 1)
    mine.set_alias(PETS, "prod", 3)
    mine.set_alias(PETS, "prod", 3)
    assert mine.aliases(PETS) == {"prod": 3}
    assert hub.repos["me/pets"].refs("tags")["prod"] == hub.repos["me/pets"].resolve("v3")
    for alias in ("v7", "latest", "beef"):
        with pytest.raises(RefError):
            mine.set_alias(PETS, alias, 1)
    with pytest.raises(RefError, match="no alias 'test'") as caught:
        mine.version(f"{PETS}@test")
    assert caught.value.hint == "it has latest, prod"
    with pytest.raises(RefError, match="there is no") as caught:
        mine.set_alias(PETS, "prod", 9)
    assert caught.value.hint == f"the newest is {PETS}@v3"


def test_what_others_did_by_hand_stops_no_push(mine, other, hub):
    """A tag of what is no version is no alias, and a file deleted in the browser is not deleted once more."""
    repo = hub.repos["me/pets"]
    repo.tag("before", repo.commit(None, [("cpserve.json", None)], "no version", branch="aside"))
    gone = min(files_of(3).keys() - files_of(1).keys())
    other.pull(PETS, for_training=True)
    repo.commit(None, [(gone, None)], "Delete file")
    other.commit("pets", files_of(1), other.version("pets").manifest, expected_head=3)
    assert other.push("pets", PETS).versions == (4,)
    assert other.aliases(PETS) == {}


def test_tags_are_only_an_index(mine, other, hub):
    """Lost or moved tags are found by verify, never believed, and set right by repair; the log does without them."""
    repo = hub.repos["me/pets"]
    right = repo.refs("tags")
    repo.untag("v1")
    assert other.version(f"{PETS}@v1").manifest.version == 1
    repo.tag("v2", right["v3"])
    with pytest.raises(IntegrityError, match="was moved") as caught:
        other.version(f"{PETS}@v2")
    assert "--repair" in caught.value.hint
    assert [m.version for m in other.log(PETS)] == [3, 2, 1]
    assert [(p.ref, p.path) for p in other.verify(PETS)] == [(f"{PETS}@v1", "tags/v1"), (f"{PETS}@v2", "tags/v2")]
    assert other.repair(PETS) == ["v1", "v2"]
    assert repo.refs("tags") == right
    assert other.verify(PETS) == []
    with pytest.raises(StoreError):
        mine.repair("pets")


def test_a_forged_version_is_not_believed(mine, other, hub):
    """A tag moved to a well-formed commit of the same number is found out by the version that follows it."""
    store = Store(other.root / "forger")
    learn(store)
    forged = store.commit(
        "pets", {**files_of(2), "README.md": b"evil"}, mine.version("pets@v2").manifest, expected_head=1
    )
    repo = hub.repos["me/pets"]
    side = repo.commit(None, [("cpserve.json", forged.document)], "v2: dog, cat", branch="side")
    repo.tag("v2", side)
    with pytest.raises(IntegrityError, match="follows another version"):
        other.version(f"{PETS}@v2")
    assert f"{PETS}@v2" in {problem.ref for problem in other.verify(PETS)}
    assert other.repair(PETS) == ["v2"]
    assert other.verify(PETS) == []


def test_an_edited_card_is_no_version(mine, other, hub):
    """Somebody's edit in the browser moves the branch, not the version; the next push goes on top of it."""
    repo = hub.repos["me/pets"]
    repo.commit(None, [("README.md", b"# edited\n"), ("LICENSE", b"mit")], "Update README.md")
    assert content(other.version(PETS)) == files_of(3)
    other.pull(PETS, for_training=True)
    learn(mine)
    assert mine.push("pets", PETS).versions == (4,)
    assert other.verify(PETS) == []
    assert repo.resolve("main") == repo.resolve("v4")


def test_versions_are_compared_wherever_they_are(other, hub):
    """A version here, one on the Hub, or two there: the difference is the same."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for number, scale in enumerate((1.0, 3.0)):
        factors = {f"{key}.lora_A.weight": np.eye(2, 3), f"{key}.lora_B.weight": scale * np.eye(4, 2)}
        weights = save({name: factor.astype(np.float32) for name, factor in factors.items()})
        other.commit("pets", {"pytorch_lora_weights.safetensors": weights}, draft(number + 1), expected_head=number)
    other.push("pets", PETS)
    found = diff(other.version("pets@v1"), other.version("pets@v2"))
    assert found.layers[key][0] == pytest.approx(2 * 2**0.5)
    assert found.concepts == {"cat": (None, "<cat>")}
    assert diff(other.version("pets@v1"), other.version(f"{PETS}@v2")) == found
    assert diff(other.version(f"{PETS}@v1"), other.version(f"{PETS}@v2")) == found


def test_damage_on_the_hub_is_named(mine, other, hub):
    """A changed byte in a large or a small file is found by verify, named, and never used."""
    weights = next(e for e in mine.version("pets@v3").manifest.files if e.path.startswith("pytorch"))
    large = hub.repos["me/pets"].large(weights.sha256)
    large.write_bytes(large.read_bytes()[:-1] + b"?")
    assert [(p.ref, p.path) for p in other.verify(PETS)] == [(f"{PETS}@v3", weights.path)]
    with pytest.raises(IntegrityError) as caught:
        other.pull(PETS)
    assert caught.value.path == weights.path
    assert other.names() == []


def test_the_same_versions_can_be_pushed_elsewhere(mine, hub):
    """A fork is a push to another name; a new repository is private unless it is said to be public."""
    mine.push("pets", "hf://me/pets-2", public=True)
    assert not hub.repos["me/pets-2"].private
    assert mine.verify("hf://me/pets-2") == []
    assert mine.version("hf://me/pets-2@v2").document == mine.version(f"{PETS}@v2").document


def test_a_fork_of_what_was_pulled_brings_all_along(mine, other):
    """Versions of which only the manifests are here are fetched on the way to the new repository."""
    other.pull(PETS)
    learn(other)
    other.push("pets", "hf://me/fork")
    assert mine.verify("hf://me/fork") == []
    assert [m.version for m in mine.log("hf://me/fork")] == [4, 3, 2, 1]
    assert content(mine.version("hf://me/fork@v1")) == files_of(1)


def test_what_stayed_on_one_hub_is_not_asked_of_another(mine, other, hub, tmp_path):
    """Whoever moves from Hub to Hub is told what to fetch from the first, and can then."""
    other.pull(PETS, "pets")
    with HubServer(tmp_path / "two") as two:
        elsewhere = Store(other.root, endpoint=two.endpoint)
        for number in (1, 2, 3):
            with pytest.raises(StoreError, match=f"the rest is at {hub.endpoint}") as refused:
                elsewhere.push("pets", "hf://me/copy")
            assert f"pull {PETS}@v{number} --as pets --for-training --endpoint {hub.endpoint}" in refused.value.hint
            other.pull(f"{PETS}@v{number}", "pets", for_training=True)
        assert elsewhere.push("pets", "hf://me/copy").versions == (3,)
        assert elsewhere.verify("hf://me/copy") == []


def test_two_learners_from_one_head(mine, other, hub):
    """One wins; the other is told how to go on, keeps the version here, and loses nothing."""
    other.pull(PETS, for_training=True)
    learn(mine)
    loser = other.commit("pets", files_of(9), mine.version("pets").manifest, expected_head=3)
    assert mine.push("pets", PETS).versions == (4,)
    before = hub.repos["me/pets"].resolve("main")
    with pytest.raises(StoreError, match="has moved on: its head is v4") as caught:
        other.push("pets", PETS)
    assert "--fork" in caught.value.hint
    assert "--as" in caught.value.hint
    assert hub.repos["me/pets"].resolve("main") == before
    assert content(other.version("pets@v4")) == content(loser)
    with pytest.raises(StoreError, match="is another than") as caught:
        other.pull(PETS)
    assert "--as NAME" in caught.value.hint
    assert other.pull(PETS, "theirs").versions == (1, 2, 3, 4)


def test_a_push_from_behind_changes_nothing(mine, other, hub):
    """Whoever has only older versions of the same line has nothing to push."""
    other.pull(f"{PETS}@v2", for_training=True)
    before = hub.repos["me/pets"].resolve("main")
    assert other.push("pets", PETS).versions == ()
    assert hub.repos["me/pets"].resolve("main") == before


def test_only_whole_versions_are_pushed(other, hub, tmp_path):
    """A damaged file stops its version, names itself, and what was whole before it is there."""
    learn(other, count=2)
    entry = next(e for e in other.version("pets@v2").manifest.files if e.path == "README.md")
    (other.root / "blobs" / entry.sha256).write_bytes(b"bad")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        other.push("pets", PETS)
    assert [m.version for m in other.log(PETS)] == [1]
    assert other.verify(PETS) == []
    shutil.rmtree(tmp_path / "cache")
    assert Store(tmp_path / "third").pull(PETS).versions == (1,)


def test_a_commit_goes_straight_to_the_hub(other, hub):
    """Imports need no local store: `commit` speaks to the Hub as it does here, with the head compared."""
    first = other.commit(PETS, files_of(1), learn(other).manifest, expected_head=0)
    assert str(first) == f"{PETS}@v1"
    with pytest.raises(StoreError, match="moved on"):
        other.commit(PETS, files_of(2), first.manifest, expected_head=0)
    assert other.commit(PETS, files_of(2), first.manifest, expected_head=None).manifest.version == 2
    assert other.head(PETS) == 2
    assert other.verify(PETS) == []


def test_tokens_stay_with_the_hub(mine, other, hub):
    """Large files come from another host, and no token travels there."""
    other.pull(PETS)
    elsewhere = [asked for asked in hub.asked if asked.host == "localhost"]
    assert elsewhere
    assert not any(asked.token for asked in elsewhere)
