"""What a stored adapter version is: the one JSON document, `cpserve.json`, that defines it.

Knows names, also of the files beside it, hashes and lineage.
Does not know tensors (`adapter.py`) or where versions are kept (`adapter_store`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta, Struct

from cpserve.errors import AdapterError, RefError, printable

SCHEMA = 3
FILE_NAME = "cpserve.json"
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers wants exactly one file whose name ends so, at the root
NEWEST_EMBEDDING = "learned_embeds.safetensors"
EMBEDDINGS = ("embeddings", "embeddings_2")  # folders: of the first text encoder, of SDXL's second
SAMPLES, TRAINING = "samples", "training"  # folders, too
_MEANT = {
    "@": "leave out '@' and what follows",
    "/": "leave out '/'; an adapter on the Hub is hf://user/name",
    "": "use up to 64 lower-case letters, digits, '.', '_' or '-', beginning with a letter or a digit",
}
"""What helps a name with such a sign in it."""
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}\Z"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Strict JSON: fields are checked when they are read, by their annotations, and unknown ones refused."""

    def dump(self) -> bytes:
        """The document's bytes; equal documents give equal bytes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def read(cls, document: bytes) -> Self:
        """Read untrusted bytes.

        Raises:
            ValueError: they are not JSON, or a field is missing, unknown or out of range; the sentence says which.
        """
        try:
            return msgspec.json.decode(document, type=cls)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error


class FileEntry(Document, frozen=True):
    """One file of a version: path relative to its root, size in bytes, hash of its content."""

    path: Annotated[str, Meta(min_length=1, max_length=200)]
    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class Fingerprint(Document, frozen=True):
    """A base model's identity: names and shapes of its weights, and the weights rounded to fp16."""

    architecture: Sha256
    weights: Sha256


class BaseEntry(Document, frozen=True):
    """The base model that an adapter was learned on: `builtin:emoji64`, a Hub id with its commit, or a path as it was given."""

    id: str
    fingerprint: Fingerprint
    commit: str | None = None


class ConceptEntry(Document, frozen=True):
    """One learned concept; `since` is the version in which it was learned, `pictures` how many it was learned from, `dc_accuracy`
    the share, 0 to 1, of its samples in that version that `classify` put right.
    """

    name: Name
    token: Annotated[str, Meta(pattern=rf"^<{NAME_PATTERN[1:-2]}>\Z")]
    class_word: str | None
    templates: tuple[str, ...]
    since: Annotated[int, Meta(ge=0)]
    pictures: Annotated[int, Meta(ge=0)]
    dc_accuracy: Annotated[float, Meta(ge=0, le=1)] | None = None


class Parent(Document, frozen=True):
    """A version before this one, pinned by the hash of its manifest."""

    version: Annotated[int, Meta(ge=1)]
    manifest_sha256: Sha256


class Manifest(Document, frozen=True, kw_only=True):
    """An adapter version. The trainer fills what it knows; the store fills `name`, `version`, `created`, `previous`, `files`.

    `trained_from` is the version that learning went on from: a learned version holds everything learned before it, so
    it can only follow that one. `previous` is the version before this one under the same name. `layers` says what it
    touches: `kv`, the keys and values of the cross-attention, so that it lives in the bank; `other` is for `export --merge`.
    """

    schema_version: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    name: Name = "default"
    version: Annotated[int, Meta(ge=0)] = 0
    created: str = ""
    base: BaseEntry
    concepts: tuple[ConceptEntry, ...]
    layers: Literal["kv", "other"] = "kv"
    method: str
    settings: Mapping[str, Any] = {}
    metrics: Mapping[str, Any] = {}
    libraries: Mapping[str, str] = {}
    previous: Parent | None = None
    trained_from: Parent | None = None
    files: tuple[FileEntry, ...] = ()

    @classmethod
    def parse(cls, document: bytes) -> Manifest:
        """Read untrusted bytes, of this schema or an older one.

        Raises:
            AdapterError: not JSON, a field is missing, unknown or out of range, or the schema is newer than this program.
        """
        try:
            return cls._migrating(document)
        except (ValueError, RecursionError) as error:
            raise AdapterError(
                f"{FILE_NAME} cannot be read: {plain(error)}",
                hint="check that the file comes from cpserve, or upgrade cpserve if it was written by a newer one",
            ) from None

    @classmethod
    def _migrating(cls, document: bytes) -> Manifest:
        try:
            return cls.read(document)  # nearly every document is of this schema, and a log reads many
        except msgspec.ValidationError:
            written = msgspec.json.decode(document, type=_Header).schema_version
            if written >= SCHEMA:
                raise
            return cls.read(_migrated(document, written))


class _Header(Struct):
    """What every schema has in common."""

    schema_version: Annotated[int, Meta(ge=1)] = 1


def layers_were_kv_only(old: dict[str, Any]) -> dict[str, Any]:
    """1 -> 2: there was nothing but adapters of K and V."""
    return old | {"layers": "kv"}


def samples_were_not_judged(old: dict[str, Any]) -> dict[str, Any]:
    """2 -> 3: `dc_accuracy` may be missing."""
    return old


MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: layers_were_kv_only,
    2: samples_were_not_judged,
}
"""By schema, what makes a document of it one of the next. Stored bytes never change: documents migrate as they are read."""


def _migrated(document: bytes, written: int) -> bytes:
    read = msgspec.json.decode(document)
    for schema in range(written, SCHEMA):
        read = MIGRATIONS[schema](read) | {"schema_version": schema + 1}
    return msgspec.json.encode(read)


def plain(text: object) -> str:
    """A stranger's words for a sentence: in one line, short, and without what could move a terminal's cursor."""
    words = printable(text)
    return words if len(words) <= 200 else f"{words[:197]}..."


def sample_name(concept: str, number: int) -> str:
    """What the file of a concept's sample is called; of the first, 0, every later version has one, too."""
    return f"{concept}-{number}.png"


def folded(name: str) -> str:
    """The name by which file systems that ignore case or normalise Unicode would know it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def check_name(name: str) -> str:
    """The name itself, if it may name an adapter or a concept.

    Raises:
        RefError: it does not match `[a-z0-9][a-z0-9._-]{0,63}`.
    """
    if not re.match(NAME_PATTERN, name):
        raise RefError(
            f"{name!r} cannot be a name",
            ref=name,
            hint=next((hint for sign, hint in _MEANT.items() if sign in name), _MEANT[""]),
        )
    return name
