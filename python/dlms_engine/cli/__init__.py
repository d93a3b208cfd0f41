"""``dlms``: the command line. Errors are one line and a non-zero exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDS = "the command line needs typer and rich: pip install 'dlms_engine[cli]'"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``dlms``; ``--debug`` anywhere shows tracebacks instead of one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        from .app import app
    except ImportError as error:
        if debug or (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f"dlms: {NEEDS}")
    try:
        app(args=arguments, prog_name="dlms")
    except Exception as error:
        if debug:
            raise
        print(f"dlms: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    expected = isinstance(error, ValueError | OSError | ImportError | RuntimeError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"
