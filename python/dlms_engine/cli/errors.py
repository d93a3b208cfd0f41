"""An error as one line: its text, its kind where that helps, and the line of the user's code."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPECTED = (ValueError, OSError, ImportError, RuntimeError, FloatingPointError)
"""Kinds whose text is written for people; of others the kind is said, too."""


def one_line(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """``error`` as the command line, which was given ``arguments``, shows it."""
    usage = getattr(error, "format_message", None)  # a mistake in the arguments, by typer
    text = " ".join(str(usage() if usage else error).split()) or "no message"
    if usage:
        value = _given(getattr(error, "param", None), arguments)
        if value is not None and value not in text:  # some versions of typer leave it out
            text = text.replace(": ", f": {value}: ", 1)
        return f"{text} (dlms --help, dlms COMMAND --help)"
    place = own_line(error)
    if isinstance(error, EXPECTED):
        return f"{text} ({place})" if place else text
    return f"{type(error).__name__}: {text} ({place + '; ' if place else ''}--debug shows where)"


def _given(option: Any, arguments: Sequence[str]) -> str | None:
    """The value that an option has among the arguments, None where it is not there."""
    names = getattr(option, "opts", ())
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and name.startswith("-"):
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def own_line(error: BaseException) -> str:
    """``"mine.py, line 3"``: the innermost line outside of this package and what is installed."""
    paths = sysconfig.get_paths()
    installed = {Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    installed.add(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and "site-packages" not in path.parts and not installed & {*path.parents}:
            return f"{path.name}, line {frame.lineno}"
    return ""
