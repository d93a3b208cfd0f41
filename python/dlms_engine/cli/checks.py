"""Refusals before anything is loaded: options without effect, outputs of another kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from .config import given

HANDCRAFTED = ("nfe", "grid", "order", "afs", "set_")
"""Options that describe a handcrafted solver."""
SOLVER_SUFFIX = ".safetensors"
# Suffixes of files that are no folder's name: weights, packages, texts.
_FILES = (".bin", ".ckpt", ".json", ".onnx", ".pkl", ".pt", ".pt2", ".pth", ".safetensor", ".yaml")


def refuse_beside(context: typer.Context, what: str, names: Sequence[str]) -> None:
    """Raises for the first of the options ``names`` that was said: beside ``what`` it has no effect.

    Raises:
        ValueError: names the option and its value.
    """
    for name in names:
        if given(context, name):
            value = context.params.get(name)
            option = "--" + name.strip("_").replace("_", "-")
            raise ValueError(f"{option} {_said(value)} has no effect {what}: leave it out")


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def check_solver_output(output: Path, *, folder_too: bool = False) -> None:
    """Before a training: is this where a solver file (or a scheduler's folder) can go?

    Raises:
        ValueError: another suffix.
    """
    if output.suffix == SOLVER_SUFFIX:
        return
    if folder_too and output.suffix not in _FILES:
        return
    or_folder = " or a folder for the scheduler" if folder_too else ""
    raise ValueError(
        f"output is {output}: a solver file's name ends in {SOLVER_SUFFIX}{or_folder}; try "
        f"--output {output.with_suffix(SOLVER_SUFFIX)}"
    )


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that is no unsigned number of 64 bits."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}, expected 0 to 2^64 - 1")
