"""`cpserve` on its command line, within this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from cpserve.cli import main


def run(*args: object, code: int = 0) -> Result:
    """`cpserve *args`, which ends with `code`; what it does not catch itself is raised."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result
