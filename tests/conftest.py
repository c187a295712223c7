"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings

from qcompile.cli import cli
from qcompile.command_group import run

settings.register_profile("shared machine", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("shared machine")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs one command line in this process; gives (exit status, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        status = run(cli, [str(a) for a in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
