"""One call of the command line, in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from memwrap.cli.app import app


def run(*words: object, expect: int = 0, stdin: str | None = None) -> Result:
    """The result of `memwrap WORDS`; it must end with the exit status `expect`."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert result.exit_code == expect, (result.output, result.exception)
    if expect == 2:
        assert "Traceback" not in result.output
    return result
