"""Every error that `cpserve` raises on purpose: one tree, typed fields, and a `hint` that says what to do next."""

from __future__ import annotations

from dataclasses import dataclass, field


def printable(value: object) -> str:
    """Without what could move a terminal's cursor: names of strangers' files come this way."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def first_line(error: BaseException) -> str:
    """What another library said went wrong, in one line; its kind where it said nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(eq=False)
class CpserveError(Exception):
    """Something the user can act on. `str()` is one sentence; `hint` is the command or the change that helps."""

    message: str
    hint: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class ConceptError(CpserveError):
    """A zip, folder or picture that cannot be taken; `entry` names the offending file and `rule` what it breaks."""

    entry: str = field(default="", kw_only=True)
    rule: str = field(default="", kw_only=True)


@dataclass(eq=False)
class RefError(CpserveError):
    """A name, version, alias or `hf://` reference that is malformed or does not exist."""

    ref: str = field(default="", kw_only=True)


@dataclass(eq=False)
class StoreError(CpserveError):
    """The adapter store cannot do what was asked: it is locked, full, or its head has moved on."""


@dataclass(eq=False)
class IntegrityError(StoreError):
    """A stored or downloaded file whose bytes are not those that its manifest promises; `path` names it."""

    path: str = field(default="", kw_only=True)


@dataclass(eq=False)
class BaseModelError(CpserveError):
    """A base model that cannot be loaded or does not have the architecture that is needed."""


@dataclass(eq=False)
class AdapterError(CpserveError):
    """An adapter that does not fit: other layers than cross-attention K,V, wrong shapes, or another base."""


@dataclass(eq=False)
class EngineError(CpserveError):
    """An engine that cannot be opened here, was closed, or was given rows outside its signature."""


@dataclass(eq=False)
class TrainingError(CpserveError):
    """Training that cannot start or go on; `state` is the folder with the last good state, where there is one."""

    state: str = field(default="", kw_only=True)
