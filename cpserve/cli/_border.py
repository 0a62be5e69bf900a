"""The one border where what went wrong becomes words and an exit code.

CpserveError        its sentence and the hint on stderr, 1
memory ran out      the same
the disk refuses    the path and the system's words, 1
a wrong option      click's own words, 2
KeyboardInterrupt   what was kept, 130
a closed pipe       nothing (click sees to it)
anything else       is a bug and keeps its traceback
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cpserve.errors import CpserveError, printable
from cpserve.tokens import address

STOPPED = 130  # as shells report a process that Ctrl-C ended
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE})
"""What the operating system says of disks, and of a user's paths; every other error of its is a bug here."""


class BorderGroup(click.Group):
    """A group whose commands may raise what the table above says."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            address()  # the Hub's client reads HF_ENDPOINT when it is imported, and breaks there
            with enough_memory():
                return super().invoke(ctx)
        except CpserveError as error:
            click.echo(f"error: {printable(error)}", err=True)
            if error.hint:
                click.echo(f"hint: {printable(error.hint)}", err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno not in FULL and not (error.errno in REFUSALS and error.filename):
                raise
            click.echo(f"error: {printable(error.filename or 'the disk')}: {error.strerror}", err=True)
            click.echo(
                "hint: check the path, its permissions and the space that is left, or name another one", err=True
            )
            ctx.exit(1)
        except KeyboardInterrupt as stop:
            click.echo(f"\nstopped: {str(stop) or 'nothing was kept'}", err=True)
            ctx.exit(STOPPED)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn the ways in which torch and Python say that there is not enough into a sentence."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort):  # RuntimeErrors, both
        raise
    except (MemoryError, RuntimeError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        words = str(error).partition("\n")[0]
        raise CpserveError(
            f"memory ran out: {words}" if words else "memory ran out",
            hint="close other programs and say it again (train: with --resume), or ask for less at a time:"
            " a smaller --size or --batch; train: --resume with accumulate = 2 or more, up to the batch, in the file for --config",
        ) from error


@contextmanager
def when_stopped(kept: str) -> Iterator[None]:
    """Say `kept` if Ctrl-C ends what is inside."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(kept) from stop


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a sentence about the user's own `path`."""
    try:
        yield
    except OSError as error:
        raise CpserveError(
            f"{path} cannot be written: {error.strerror or error}", hint="free some space, or choose another place"
        ) from error


def write(path: Path, data: bytes) -> None:
    """Write the file, with its folders; what cannot be written whole leaves what was there.

    Raises:
        CpserveError: the disk refuses.
    """
    from adapter_store.atomic import staged  # the store is slow to import

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path.parent, data) as whole:
            whole.replace(path)
