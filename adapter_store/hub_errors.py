"""What the Hub's client raises, as one sentence and the way out: one table, one border, and which errors are worth another try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import constants
from huggingface_hub import errors as hf

from adapter_store.atomic import FULL
from cpserve.errors import CpserveError, RefError, StoreError, first_line

# The client's transport library is its own affair (httpx up to 1.x, httpx2 since): its errors' root is its own errors' base.
TRANSPORT: type[Exception] = hf.HfHubHTTPError.__mro__[1]
RAISED = (OSError, ValueError, RuntimeError, NotImplementedError, TRANSPORT)

BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Row:
    """Which errors, and what to say: `{ref}` is what was asked for, `{repo}` its repository, `{endpoint}` the Hub."""

    fits: Callable[[BaseException], bool]
    sentence: str
    hint: str
    kind: type[CpserveError] = StoreError


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _answers(*codes: int) -> Callable[[BaseException], bool]:
    return lambda error: status(error) in codes


ROWS = (
    Row(
        lambda error: (
            constants.HF_HUB_OFFLINE and isinstance(error, hf.OfflineModeIsEnabled | hf.LocalEntryNotFoundError)
        ),
        "{ref} is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub",
        "pull it once while online, or unset HF_HUB_OFFLINE",
    ),
    Row(
        _is(hf.LocalEntryNotFoundError),
        "{ref} is not in the cache, and {endpoint} cannot be reached",
        "check the network, and HF_ENDPOINT or --endpoint",
    ),
    Row(
        _is(hf.GatedRepoError),
        "{ref} is gated: its owner decides who may read it",
        "ask for access at {endpoint}/{repo}, then use a token of that account: HF_TOKEN or --token-file",
    ),
    Row(
        _is(hf.DisabledRepoError),
        "{ref} was disabled by the Hub",
        "its page says more: {endpoint}/{repo}",
    ),
    Row(
        lambda error: isinstance(error, hf.RepositoryNotFoundError) or status(error) == 401,
        "{ref} does not exist, is private, or the token is wrong",
        "check the name; if it is private, give a token that may read it: HF_TOKEN or --token-file",
        RefError,
    ),
    Row(
        _is(hf.RevisionNotFoundError),
        "there is no {ref}",
        "see: cpserve adapters log hf://{repo}",
        RefError,
    ),
    Row(
        _is(hf.EntryNotFoundError),
        "{ref} is not an adapter that cpserve can read: a file is missing",
        "check the name; an adapter without cpserve.json can be taken in by: cpserve adapters import",
        RefError,
    ),
    Row(
        _answers(403),
        "the token may not do this to {repo}",
        "use a token that may write there: HF_TOKEN or --token-file",
    ),
    Row(
        _answers(409),
        "another commit to {repo} is under way; nothing of yours was stored",
        "run the same command again in a minute",
    ),
    Row(
        _answers(412),
        "others keep committing to {repo}; nothing of yours was stored",
        "run the same command again",
    ),
    Row(
        _answers(429),
        "{endpoint} got too many requests from here",
        "wait some minutes, then run the same command again",
    ),
    Row(
        lambda error: status(error) >= 500,
        "{endpoint} has trouble of its own",
        "run the same command again later: what is there already is not sent twice",
    ),
    Row(
        lambda error: isinstance(error, OSError) and error.errno in FULL,
        "the disk is full; nothing was stored",
        "free some space, then run the same command again",
    ),
    Row(
        lambda error: status(error) == 0 and isinstance(error, TRANSPORT),
        "{endpoint} cannot be reached or broke off",
        "check the network, and HF_ENDPOINT or --endpoint; then run the same command again",
    ),
    Row(
        lambda error: "xet-write-token" in str(error) and "404" in str(error),
        "{endpoint} does not take uploads by Xet",
        "set HF_HUB_DISABLE_XET=1 and run the same command again",
    ),
    Row(
        _is(Exception),
        "the Hub did not do it for {ref}: {error}",
        "run the same command again; if it stays so, look at {endpoint}/{repo}",
    ),
)


def status(error: BaseException) -> int:
    """The HTTP status that an error stands for, 0 where it stands for none."""
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0) or 0)


def cause(error: BaseException) -> BaseException:
    """What went wrong below the client's own wrapping of it."""
    while isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__
    return error


def is_moved(error: BaseException) -> bool:
    """Whether somebody else was first."""
    return status(error) == 412


def is_busy(error: BaseException) -> bool:
    """Whether the same may succeed in a moment, or may have succeeded already."""
    return status(error) in BUSY or (status(error) == 0 and isinstance(error, TRANSPORT))


def retry_after(error: BaseException) -> float:
    """How many seconds the Hub asks to wait; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except (TypeError, ValueError):
        return 0.0


def explained(error: BaseException, ref: str, endpoint: str) -> CpserveError:
    """The sentence for an error; `ref` is what was asked for, as `hf://user/repo` or with a version."""
    error = cause(error)
    row = next(row for row in ROWS if row.fits(error))
    repo = ref.removeprefix("hf://").partition("@")[0]
    words = {"ref": ref, "repo": repo, "endpoint": endpoint, "error": first_line(error)}
    more = {"ref": ref} if row.kind is RefError else {}
    return row.kind(row.sentence.format(**words), hint=row.hint.format(**words), **more)


@contextmanager
def hub_errors(ref: str, endpoint: str) -> Iterator[None]:
    """Turn whatever the client raises into its sentence."""
    try:
        yield
    except RAISED as error:
        raise explained(error, ref, endpoint) from error
