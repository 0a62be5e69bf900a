"""Laws of the manifest: a document is its bytes, and untrusted bytes are a manifest or an error with a hint."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from adapter_store.store import Store
from cpserve.errors import AdapterError, CpserveError
from cpserve.manifest import MIGRATIONS, SCHEMA, BaseEntry, ConceptEntry, FileEntry, Fingerprint, Manifest, Parent

LAW = settings(max_examples=200)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
parents = st.none() | st.builds(Parent, version=st.integers(1, 99), manifest_sha256=hashes)
manifests = st.builds(
    Manifest,
    name=names,
    version=st.integers(0, 99),
    created=text,
    base=st.builds(
        BaseEntry, id=text, fingerprint=st.builds(Fingerprint, architecture=hashes, weights=hashes), commit=text
    ),
    concepts=st.lists(
        st.builds(
            ConceptEntry,
            name=names,
            token=st.from_regex(r"<[a-z0-9][a-z0-9._-]{0,63}>", fullmatch=True),
            class_word=st.none() | text,
            templates=st.lists(text, max_size=2).map(tuple),
            since=st.integers(0, 9),
            pictures=st.integers(0, 200),
            dc_accuracy=st.none() | st.floats(0, 1),
        ),
        max_size=2,
    ).map(tuple),
    layers=st.sampled_from(["kv", "other"]),
    method=text,
    settings=st.dictionaries(text, json, max_size=3),
    metrics=st.dictionaries(text, json, max_size=3),
    libraries=st.dictionaries(text, text, max_size=2),
    previous=parents,
    trained_from=parents,
    files=st.lists(
        st.builds(FileEntry, path=text.filter(bool), size=st.integers(0, 2**40), sha256=hashes), max_size=2
    ).map(tuple),
)


@LAW
@given(manifest=manifests)
def test_a_manifest_is_its_document(manifest):
    """Any manifest reads back equal from its bytes, and gives the same bytes again."""
    again = Manifest.parse(manifest.dump())
    assert again == manifest
    assert again.dump() == manifest.dump()


@LAW
@given(manifest=manifests, place=st.integers(0), value=st.integers(0, 255), cut=st.integers(0))
def test_a_damaged_manifest_raises_nothing_but_our_own_errors(manifest, place, value, cut):
    """Any change to a document's bytes gives a manifest or a CpserveError, never another exception."""
    document = bytearray(manifest.dump())
    document[place % len(document)] = value
    try:
        Manifest.parse(bytes(document[: len(document) - cut % 3]))
    except CpserveError as error:
        hint = error.hint
    else:
        hint = "none is needed"
    assert hint


@settings(max_examples=40)
@given(manifest=manifests)
def test_the_store_changes_only_what_is_its_own_in_any_draft(tmp_path_factory, manifest):
    """Whatever the trainer says is stored as said."""
    store = Store(tmp_path_factory.mktemp("any"))
    stored = store.commit(manifest.name, {"a": b"1"}, manifest, expected_head=0).manifest
    own = {"name": "", "version": 0, "created": "", "previous": None, "files": (), "concepts": ()}
    assert replace(stored, **own) == replace(manifest, **own)
    assert [c.since for c in stored.concepts] == [c.since or 1 for c in manifest.concepts]
    assert store.verify() == []


WRITTEN_BY_SCHEMA_1 = b"""{
 "schema_version": 1, "name": "pets", "version": 1, "created": "2026-11-24T10:00:00Z",
 "base": {"id": "builtin:emoji64", "fingerprint": {"architecture": "%(zeros)s", "weights": "%(zeros)s"}, "commit": null},
 "concepts": [{"name": "dog", "token": "<dog>", "class_word": null, "templates": ["a {}"], "since": 1, "pictures": 6}],
 "method": "ewc-dc", "settings": {"steps": 400}, "metrics": {}, "libraries": {}, "previous": null, "trained_from": null,
 "files": [{"path": "README.md", "size": 1, "sha256": "%(zeros)s"}]
}""" % {b"zeros": b"0" * 64}


def test_an_old_document_reads_as_a_manifest_of_today():
    """A document that an older program wrote is migrated while it is read; one of a newer schema is refused in words."""
    manifest = Manifest.parse(WRITTEN_BY_SCHEMA_1)
    assert manifest.schema_version == SCHEMA
    assert manifest.layers == "kv"
    assert manifest.concepts[0].dc_accuracy is None
    assert manifest.concepts[0].templates == ("a {}",)
    assert Manifest.parse(manifest.dump()) == manifest
    newer = manifest.dump().replace(b'"schema_version": %d' % SCHEMA, b'"schema_version": %d' % (SCHEMA + 1))
    with pytest.raises(AdapterError, match="schema_version") as caught:
        Manifest.parse(newer)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "document", [b"[" * 10**5, b'{"settings": ' + b'{"a": ' * 10**5, b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"]
)
def test_a_document_nested_without_end_is_refused_in_words(document):
    """Neither the stack nor the interpreter's limit is what a stranger's file meets first."""
    with pytest.raises(AdapterError, match="cannot be read"):
        Manifest.parse(document)


def test_every_old_schema_has_its_migration():
    """From each schema there is a named step to the next."""
    assert list(MIGRATIONS) == list(range(1, SCHEMA))


@LAW
@given(place=st.integers(0), value=st.integers(0, 255), cut=st.integers(0))
def test_a_damaged_old_document_raises_nothing_but_our_own_errors(place, value, cut):
    """Migrating runs over untrusted bytes, too."""
    document = bytearray(WRITTEN_BY_SCHEMA_1)
    document[place % len(document)] = value
    try:
        Manifest.parse(bytes(document[: len(document) - cut % 3]))
    except CpserveError as error:
        hint = error.hint
    else:
        hint = "none is needed"
    assert hint
