"""Grids for learners: by name, as numbers, from another learner's solver file; refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...policies.distilled import load_solver
from ...processes import Process, grids
from ...solvers.policy import policy_of
from ...solvers.table import SolverTable

GridSource = str | Path | Sequence[float] | Tensor | SolverTable
"""A grid's name, a solver file (``*.safetensors``), explicit times, or a table."""


class StartTimes(NamedTuple):
    """float64 ``[steps + 1]`` grid and, where the source has them, network times."""

    grid: Tensor
    network: Tensor | None


def start_times(process: Process, source: GridSource, steps: int) -> StartTimes:
    """Times to start from.

    Args:
        source: a name of ``grids.GRIDS``; the path of a solver file written by any learner with a
            static table (LD3, GITS, free_table, ...); a table; or ``steps + 1`` decreasing times.

    Raises:
        ValueError: unknown name, wrong number of times, times that start elsewhere than the process
            (exact solutions and validations do), or a table of another process.
    """
    times = _read(process, source, steps)
    first = float(times.grid[0])
    if not math.isclose(first, process.t_max, rel_tol=1e-6):
        raise ValueError(
            f"grid starts at {first:g}, but {process!r} at {process.t_max:g}: start there, or make the "
            f"process with t_max={first:g}"
        )
    return times


def _read(process: Process, source: GridSource, steps: int) -> StartTimes:
    if isinstance(source, (str, Path)) and str(source).endswith(".safetensors"):
        table = policy_of(load_solver(source)).static_table()
        if table is None:
            raise ValueError("grid: this solver file holds a per-sample policy, expected a table")
        return _from_table(process, table, steps)
    if isinstance(source, SolverTable):
        return _from_table(process, source, steps)
    if isinstance(source, (str, Path)):
        return StartTimes(grids.named_grid(process, str(source), steps), None)
    grid = grids.from_times(process, source)
    _check_length(grid, steps)
    return StartTimes(grid, None)


def _from_table(process: Process, table: SolverTable, steps: int) -> StartTimes:
    if table.process != process:
        raise ValueError(f"grid: its table was made for {table.process!r}, expected {process!r}")
    table = table.detach()
    _check_length(table.grid, steps)
    skipped = steps - table.nfe
    if skipped not in (0, 1):  # two evaluations a step: the grid alone is meaningful
        return StartTimes(table.grid, None)
    return StartTimes(table.grid, torch.cat([table.grid[:skipped], table.times, table.grid[-1:]]))


def _check_length(grid: Tensor, steps: int) -> None:
    if grid.shape == (steps + 1,):
        return
    if grid.ndim != 1:
        raise ValueError(f"grid has shape {tuple(grid.shape)}, expected [{steps + 1}] times")
    raise ValueError(
        f"grid has {len(grid)} times ({len(grid) - 1} steps), expected {steps + 1} ({steps} steps): "
        "take a grid of as many steps, or another nfe; with an analytical first step (afs) a solver "
        "has one step more than evaluations"
    )


def refine(process: Process, grid: Tensor, count: int) -> Tensor:
    """``[N + 1]`` -> ``[N * count + 1]``: ``count`` sub-steps inside every interval.

    Uniform in lambda_, or in t where lambda_ is infinite at an end of the interval; the grid's own
    times stay, bit for bit, at every ``count``-th place.
    """
    fractions = torch.arange(1, count, dtype=torch.float64, device="cpu") / count
    values = process.lambda_(grid)
    pieces = []
    for i in range(len(grid) - 1):
        low, high = values[i], values[i + 1]
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            inner = process.inverse_lambda(low + fractions * (high - low))
        else:
            inner = grid[i] + fractions * (grid[i + 1] - grid[i])
        pieces += [grid[i : i + 1], inner]
    return torch.cat([*pieces, grid[-1:]])
