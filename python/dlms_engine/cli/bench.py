"""``dlms bench``: hands over to ``dlms_engine.lab.bench``."""

from __future__ import annotations

import typer

from ..lab.bench.__main__ import What, benchmark


def bench(context: typer.Context, what: What) -> None:
    """Time a step, the loop, a GPU kernel or whole samples; options: dlms bench step -- --help."""
    status = benchmark(what, list(context.args))
    if status:
        raise typer.Exit(status)
