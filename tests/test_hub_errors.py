"""Laws of errors and tokens: each thing that the Hub can answer has its sentence and a way out; no token goes astray."""

# ruff: noqa: F811 - fixtures are named by arguments

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from adapter_store import Store
from adapter_store.hub_errors import ROWS, explained
from adapter_store.limits import BYTES, FILES, check_limits
from cpserve.errors import CpserveError, StoreError
from cpserve.manifest import FileEntry
from cpserve.tokens import HUGGING_FACE, connect
from tests.hubserver import Fault
from tests.hubserver.client import hub  # noqa: F401

ANSWERS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "is gated"),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}, "was disabled"),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, "does not exist, is private, or the token is wrong"),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "the token is wrong"),
    "no version": (404, {"X-Error-Code": "RevisionNotFound"}, "there is no hf://me/pets"),
    "no file": (404, {"X-Error-Code": "EntryNotFound"}, "a file is missing"),
    "forbidden": (403, {}, "the token may not do this"),
    "conflict": (409, {}, "under way"),
    "moved": (412, {}, "others keep committing"),
    "too many": (429, {}, "too many requests"),
    "broken": (500, {}, "trouble of its own"),
    "unknown": (418, {}, "the Hub did not do it"),
}


@pytest.mark.parametrize(("status", "headers", "words"), ANSWERS.values(), ids=ANSWERS)
def test_each_answer_has_its_sentence(hub, tmp_path, status, headers, words):
    """Whatever the Hub answers becomes one sentence with a hint, of one line each."""
    hub.faults.add(Fault("GET", "/refs", times=99, status=status, headers=headers))
    with pytest.raises(CpserveError, match=words) as caught:
        Store(tmp_path / "a").log("hf://me/pets")
    assert caught.value.hint
    assert "\n" not in f"{caught.value}{caught.value.hint}"


def test_every_row_says_what_and_what_to_do():
    """The table's sentences and hints are filled in from the same four words, and none is empty."""
    for row in ROWS:
        words = {"ref": "R", "repo": "U/R", "endpoint": "E", "error": "X"}
        assert row.sentence.format(**words)
        assert row.hint.format(**words)


def test_the_disk_and_whatever_else():
    """A full disk is said to be one, and what nobody thought of is quoted, in one line."""
    full = explained(OSError(errno.ENOSPC, "no space"), "hf://me/pets", "https://hub")
    assert "disk is full" in str(full)
    other = explained(RuntimeError("first line\nsecond"), "hf://me/pets@v1", "https://hub")
    assert "first line" in str(other)
    assert "second" not in str(other)


def test_a_name_with_xet_in_it_is_no_reason():
    """Only a Hub that knows no Xet upload is told to be one, whatever words else an error holds."""
    url = "https://cas-bridge.xethub.hf.co/repo/me/foxetti"
    unknown = explained(OSError(f"{url}/xet-write-token/main: 404 Not Found"), "hf://me/foxetti", "https://hub")
    assert "HF_HUB_DISABLE_XET" in unknown.hint
    for words in (f"{url} broke off", f"{url}/xet-write-token/main: 403 Forbidden"):
        assert "HF_HUB_DISABLE_XET" not in explained(OSError(words), "hf://me/foxetti", "https://hub").hint


def test_the_stored_token_goes_to_hugging_face_only(monkeypatch):
    """What `hf auth login` left is for huggingface.co; any other address gets it from nobody."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_stored")
    assert connect(environment={}).token == "hf_stored"
    assert connect(HUGGING_FACE + "/", environment={}).token == "hf_stored"
    assert connect(environment={"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}).token is False
    for elsewhere in (
        "https://hub.example",
        "http://127.0.0.1:80",
        "https://huggingface.co.example",
        "http://huggingface.co",
    ):
        assert connect(elsewhere, environment={}).token is False
        assert connect(environment={"HF_ENDPOINT": elsewhere}).token is False


def test_a_named_token_goes_where_the_user_says_but_not_in_the_clear(tmp_path):
    """`HF_TOKEN` or a file, to any https address or this machine itself; over plain http it is refused."""
    file = tmp_path / "token"
    file.write_text("hf_file\n")
    named = {"HF_TOKEN": "hf_named"}
    for safe in ("https://hub.example", "http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:80"):
        assert connect(safe, environment=named).token == "hf_named"
        assert connect(safe, file, environment=named).token == "hf_file"
    for clear in ("http://hub.example", "http://10.0.0.1", "http://localhost.example", "http://127.0.0.1.example"):
        with pytest.raises(StoreError, match="without https"):
            connect(clear, environment=named)
        assert connect(clear, environment={}).token is False


@pytest.mark.parametrize(
    "endpoint",
    [
        "huggingface.co",
        "ftp://hub.example",
        "file:///etc/passwd",
        "https://",
        "hub",
        "http://[x",
        "http://localhost:abc",
    ],
)
def test_what_is_no_address_is_refused(endpoint):
    """Only http and https with a host, and a port that is a number."""
    with pytest.raises(StoreError, match="no address") as caught:
        connect(endpoint, environment={})
    assert caught.value.hint


def test_a_token_file_that_holds_none_is_refused(tmp_path):
    """Missing, empty and binary files are errors that name the file."""
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(StoreError, match=name):
            connect(token_file=tmp_path / name, environment={})


@settings(max_examples=200)
@given(token=st.from_regex(r"hf_[A-Za-z0-9]{8,30}", fullmatch=True))
def test_a_token_is_never_printed(token):
    """Neither the connection nor an error about it shows the token."""
    assert token not in repr(connect("https://hub.example", environment={"HF_TOKEN": token}))
    with pytest.raises(StoreError) as caught:
        connect("http://hub.example", environment={"HF_TOKEN": token})
    assert token not in f"{caught.value}{caught.value.hint}"


def test_limits_are_looked_at_before_anything_is_fetched(tmp_path):
    """Too many files, or too large ones, are refused by the manifest alone."""
    one = FileEntry(path="a", size=1, sha256="0" * 64)
    check_limits("R", [one], tmp_path / "not" / "yet")
    for entries in ([one] * (FILES + 1), [replace(one, size=BYTES + 1)]):
        with pytest.raises(StoreError, match="are not fetched") as caught:
            check_limits("R", entries, tmp_path)
        assert caught.value.hint
