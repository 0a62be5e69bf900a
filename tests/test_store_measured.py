"""Laws of measured versions: what `cpserve eval` wrote becomes a new version's card, or is refused; nothing else changes."""

# ruff: noqa: F811 - fixtures are named by arguments

from __future__ import annotations

import io
import json
import re
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adapter_store import Store
from adapter_store.layout import CARD, EVALUATION, MATRIX
from adapter_store.measured import draw_matrix, read_evaluation
from cpserve.errors import AdapterError
from tests.command import run
from tests.hubserver.client import hub  # noqa: F401
from tests.hubserver.content import NAMES, learn

WRITTEN = {
    "version": "pets@v3",
    "manifest_sha256": "0" * 64,
    "judge": "pixels",
    "concepts": list(NAMES[:3]),
    "kept": 0.8,
    "alignment": None,
    "forgetting": 0.1,
    "kept_matrix": {"0": {"0": 1.0}, "1": {"0": 0.9, "1": 1.0}, "2": {"0": -0.2, "1": 0.6, "2": 1.0000001}},
    "dc_matrix": {"0": {"0": 1.0}},
}


annotate = partial(run, "adapters", "annotate")


def written_of(version):
    """What `cpserve eval` writes of it."""
    return WRITTEN | {"version": str(version), "manifest_sha256": version.pin.manifest_sha256}


@pytest.fixture
def store(tmp_path):
    """Three versions of pets."""
    store = Store(tmp_path / "home")
    learn(store, count=3)
    return store


@pytest.fixture
def folder(tmp_path, store):
    """What `cpserve eval pets --out` leaves."""
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "evaluation.json").write_text(json.dumps(written_of(store.version("pets"))))
    return tmp_path / "measured"


def test_what_was_measured_is_shown_on_the_card_of_a_new_version(store, folder):
    """The files are the older version's but for the card, which shows a picture that is there, and the scores."""
    old = store.version("pets")
    assert annotate("pets", folder, "--store", store.root).stdout == "pets@v4 is pets@v3 with what was measured of it\n"
    new = store.version("pets")
    assert set(new.paths()) == {*old.paths(), EVALUATION, MATRIX}
    assert all(new.read(path) == old.read(path) for path in old.paths() if path != CARD)
    assert new.manifest.concepts == old.manifest.concepts
    card = new.read(CARD).decode()
    assert set(re.findall(r"!\[[^]]*\]\((.*?)\)", card)) == {MATRIX, *(f"samples/{name}-0.png" for name in NAMES[:3])}
    assert "- forgetting: 0.1" in card
    assert "alignment" not in card
    assert new.manifest.metrics == {"kept": 0.8, "forgetting": 0.1, "judge": "pixels"}
    with Image.open(io.BytesIO(new.read(MATRIX))) as picture:
        assert picture.format == "PNG"
    assert store.verify() == []


def test_on_the_hub_no_weight_is_sent_again(store, folder, hub):
    """A version there is annotated there, as one commit that brings the card, the picture and the numbers."""
    store.push("pets", "hf://me/pets")
    uploads = len(hub.uploaded)
    annotate("hf://me/pets", folder, "--store", store.root)
    assert len(hub.uploaded) == uploads
    assert MATRIX in store.version("hf://me/pets@v4").paths()
    assert store.verify("hf://me/pets") == []


WRONG = {
    "another matrix": {"kept_matrix": {"0": {"0": 1.0}}},
    "no cosine": {"kept_matrix": {"0": {"0": 2.0}}},
    "no number": {"kept": float("nan")},
    "no concept": {"concepts": [], "kept_matrix": {}},
    "another version": {"version": "ox\x1b@v3", "manifest_sha256": "0" * 64},
}


@pytest.mark.parametrize("content", [b"{", b"{}", *WRONG.values()], ids=["no JSON", "nothing", *WRONG])
def test_what_is_no_evaluation_of_this_version_is_refused(store, folder, content):
    """In one sentence with the command that makes one, and nothing is stored."""
    if isinstance(content, dict):
        content = json.dumps(written_of(store.version("pets")) | content).encode()
    (folder / "evaluation.json").write_bytes(content)
    refused = annotate("pets", folder, "--store", store.root, code=1)
    assert "cpserve eval" in refused.stderr
    assert len(refused.stderr.splitlines()) == 2
    assert "\x1b" not in refused.stderr
    assert store.head("pets") == 3


def test_what_was_measured_before_the_last_change_is_refused(store, folder):
    """The same concepts learned by another method, or one version later, were not measured."""
    annotate("pets", folder, "--store", store.root)
    assert "pets@v3, not what pets@v4 is" in annotate("pets", folder, "--store", store.root, code=1).stderr


def test_a_folder_without_an_evaluation_is_refused(store, tmp_path):
    """The file is named."""
    assert "evaluation.json cannot be read" in annotate("pets", tmp_path, "--store", store.root, code=1).stderr


@settings(max_examples=50)
@given(
    names=st.lists(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True), min_size=1, max_size=5, unique=True),
    value=st.floats(-1, 1),
)
def test_any_matrix_can_be_drawn(names, value):
    """Whatever the names and numbers."""
    matrix = {str(j): {str(i): value for i in range(j + 1)} for j in range(len(names))}
    written = WRITTEN | {"concepts": names, "kept_matrix": matrix}
    assert draw_matrix(read_evaluation("x", json.dumps(written).encode())).startswith(b"\x89PNG")


@settings(max_examples=200)
@given(place=st.integers(0), value=st.integers(0, 255))
def test_a_damaged_evaluation_raises_nothing_but_our_own_error(place, value):
    """Any changed byte gives an evaluation or a clean refusal."""
    content = bytearray(json.dumps(WRITTEN).encode())
    content[place % len(content)] = value
    try:
        hint = read_evaluation("x", bytes(content)).judge or "none is needed"
    except AdapterError as error:
        hint = error.hint
    assert hint
