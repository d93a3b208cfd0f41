"""``dlms``: the command line. Errors are one line and a non-zero exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import one_line

OLD_NAMES = {
    "compare": {"--nfes": "--nfe"},
    "recommend": {"--keep": "--store"},
    "evaluate": {
        "--nfes": "--nfe", "--full-nfes": "--full-nfe", "--compared-samples": "--exact-samples",
    },
    "reproduce": {
        "--nfes": "--nfe", "--rmse-samples": "--exact-samples", "--seeds": "--seed",
    },
}  # fmt: skip
"""command -> options that had another name before -> what they are called now."""

NEEDS = "the command line needs typer and rich: pip install typer rich"


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``dlms``; ``--debug`` anywhere shows tracebacks instead of one line."""
    try:
        status = _status(argv)
    except KeyboardInterrupt:  # the imports take seconds
        status = INTERRUPTED
    if status == INTERRUPTED:
        print(f"dlms: {_rank()}interrupted", file=sys.stderr)
    if status:
        sys.exit(status)


def _status(argv: Sequence[str] | None) -> int:
    """The exit code; errors are printed here."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in arguments
    arguments = _renamed([argument for argument in arguments if argument != "--debug"])
    try:
        import typer

        from .app import app
    except ImportError as error:
        if debug or (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f"dlms: {NEEDS}")
    try:
        status = app(args=arguments, prog_name="dlms", standalone_mode=False)
    except typer.Abort:  # of an interrupt some versions of typer raise it, others return its code
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(f"dlms: {_rank()}{one_line(error, arguments)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return status if isinstance(status, int) else 0


def _renamed(arguments: list[str]) -> list[str]:
    """The same with the options' present names."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    names = OLD_NAMES.get(command, {})
    split = (argument.partition("=") for argument in arguments)
    return [names.get(name, name) + equals + value for name, equals, value in split]


def _rank() -> str:
    """``"rank 1: "`` where torchrun runs several processes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    return f"rank {os.environ['RANK']}: " if several else ""
