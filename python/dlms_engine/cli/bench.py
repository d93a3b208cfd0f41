"""``dlms bench``: hands over to ``dlms_engine.lab.bench``."""

from __future__ import annotations

import importlib
from enum import Enum

import typer


class What(str, Enum):
    """Benchmarks there are."""

    step = "step"
    loop = "loop"
    device = "device"
    pipeline = "pipeline"
    distill = "distill"


def bench(context: typer.Context, what: What) -> None:
    """Time a step, the loop, a GPU kernel or whole samples; options: dlms bench step -- --help."""
    module = importlib.import_module(f"dlms_engine.lab.bench.{what.value}")
    status = module.main(list(context.args))
    if status:
        raise typer.Exit(int(status))
