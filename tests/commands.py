"""``dlms`` inside a test: exit codes, what it prints, the one line it fails with."""

from __future__ import annotations

import json

import pytest

from dlms_engine.cli import main


def run(*arguments: object) -> int:
    """Exit code of ``dlms ARGUMENTS``."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    """What ``dlms ARGUMENTS --json`` says."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0, capsys.readouterr().err
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line ``dlms ARGUMENTS`` fails with."""
    capsys.readouterr()
    assert run(*arguments) != 0
    captured = capsys.readouterr()
    assert captured.err.startswith("dlms: ") and captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    return captured.err
