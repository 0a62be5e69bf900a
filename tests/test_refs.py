"""Laws of references: what can be written, what it means, and what is reserved."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.ref import Ref, check_alias
from cpserve.errors import RefError

LAW = settings(max_examples=300)

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
RESERVED = ("latest", "main")
aliases = names.filter(
    lambda name: name not in RESERVED and set(name) - set("0123456789abcdef") and not name[1:].isdigit()
)
versions = st.integers(1, 10**9 - 1).map("v{}".format)
commits = st.from_regex(r"[0-9a-f]{7,40}", fullmatch=True)
parts = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9]|[._-](?=[A-Za-z0-9])){0,40}", fullmatch=True)
repos = st.tuples(parts, parts).map("/".join).filter(lambda repo: not repo.endswith(".git") and len(repo) <= 96)
moving = st.one_of(st.just("latest"), versions, aliases)
references = st.one_of(
    names,
    st.tuples(names, moving).map("@".join),
    repos.map("hf://{}".format),
    st.tuples(repos.map("hf://{}".format), moving | commits).map("@".join),
)


@LAW
@given(text=references)
def test_a_reference_reads_back_as_it_was_written(text):
    """`str` undoes `parse`, and what `at` says is one thing at most: a version, a commit or an alias."""
    ref = Ref.parse(text)
    assert str(ref) == text
    assert Ref.parse(str(ref)) == ref
    assert sum(part is not None for part in (ref.version, ref.commit, ref.alias)) == (ref.at not in {None, "latest"})


@LAW
@given(text=st.text(max_size=40) | st.text("hf:/@v0.-aA\n", max_size=20))
def test_any_text_is_a_reference_or_a_ref_error(text):
    """Whatever is typed is taken as it stands or refused with a hint, and nothing else is raised."""
    try:
        ref = Ref.parse(text)
    except RefError as error:
        ref, hint = None, error.hint
    assert str(ref) == text if ref else hint


@pytest.mark.parametrize(
    ("text", "version", "commit", "alias"),
    [
        ("dog", None, None, None),
        ("dog@latest", None, None, None),
        ("dog@v3", 3, None, None),
        ("dog@prod", None, None, "prod"),
        ("hf://me/dogs", None, None, None),
        ("hf://me/dogs@v12", 12, None, None),
        ("hf://Me/my.Dogs_@prod", None, None, "prod"),
        ("hf://me/dogs@deadbeef", None, "deadbeef", None),
    ],
)
def test_the_grammar(text, version, commit, alias):
    """Each documented form means what the documents say."""
    ref = Ref.parse(text)
    assert (ref.version, ref.commit, ref.alias) == (version, commit, alias)
    assert ref.hub == text.startswith("hf://")


@pytest.mark.parametrize(
    "text",
    [
        "", "@v1", "dog@", "dog@@v1", "dog@v1@v2", "Dog", "../dog", "dog/v1", "dog\n", "dog@v1\n", "dog@v0", "dog@v01",
        "dog@deadbeef", "dog@beef", "dog@V1", "dog@../x", "hf://", "hf://dog", "hf://me/", "hf://me/a/b", "hf://me/-a",
        "hf://me/a..b", "hf://me/a--b", "hf://me/a.git", "hf://me/a@beef", "hf://me/" + "a" * 94, "HF://me/dogs",
        "https://huggingface.co/me/dogs",
    ],
)  # fmt: skip
def test_malformed_references_are_refused(text):
    """What is not in the grammar is refused with a hint."""
    with pytest.raises(RefError) as caught:
        Ref.parse(text)
    assert caught.value.hint


@LAW
@given(alias=st.one_of(st.sampled_from(RESERVED), st.from_regex(r"v[0-9]+|[0-9a-f]+", fullmatch=True)))
def test_no_alias_can_be_taken_for_a_version_or_a_commit(alias):
    """`latest`, the Hub's branch, every `vN` and every run of hex digits are reserved."""
    with pytest.raises(RefError):
        check_alias(alias)


@LAW
@given(alias=aliases)
def test_every_other_name_may_be_an_alias(alias):
    """An alias is any name that is not reserved."""
    assert check_alias(alias) == alias
