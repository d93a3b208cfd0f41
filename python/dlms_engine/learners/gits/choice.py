"""The searched grids beside the standard ones, judged by where the student ends.

The search sees Euler jumps along the teacher's trajectory, not the student; on flows and discrete
times it can place times at which the student is ten times worse than on a uniform grid. So every
grid that was tried and every standard one, with and without an analytical first step, is run, and
the one that ends nearest to the model's exact solution is kept: a searched one where it is nearer
than every standard one beyond chance. Those that chance could have put first are run once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from ...processes import Process
from ...solvers.table import SolverTable
from ...support.values import require_finite
from ..start import ExactSolution, SamplingProblem, run_tables
from ..start.nearer import nearer, rmse_of, tied
from ..training.conclude import standard_tables
from .settings import GitsSettings

JUDGED = range(1 << 23, (1 << 23) + 128)
"""Numbers of the samples that grids are compared on, apart from those of the search."""
ONCE_MORE = 3
"""Times as many samples for those that are tied."""


def standard_students(process: Process, settings: GitsSettings) -> dict[str, SolverTable]:
    """The student on every standard grid with ``settings.nfe`` evaluations, by name."""
    options: dict[str, Any] = dict(settings.options)
    if settings.order is not None:
        options["order"] = settings.order
    return standard_tables(process, settings.solver, settings.nfe, options, (False, True))


def nearest_to_exact(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    searched: dict[str, SolverTable],
    settings: GitsSettings,
    *,
    seed: int,
    conditions: Any = None,
) -> tuple[str, SolverTable, list[dict[str, Any]]]:
    """(name, table, all with their errors) of the grid whose end is nearest to the exact one."""
    problem = SamplingProblem(denoiser, shape, conditions or None, seed=seed)
    tables = {**searched, **standard_students(problem.process, settings)}
    exact = ExactSolution(problem)
    exact.prove()
    ends = run_tables(problem, list(tables.values()), JUDGED)
    squares = _squares(exact, tables, ends, JUDGED)
    assert exact.proof is not None
    steps = exact.proof.steps
    if exact.prove(min(map(rmse_of, squares.values()))).steps != steps:
        squares = _squares(exact, tables, ends, JUDGED)
    near = tied(squares)
    if len(near) > 1:
        more = range(JUDGED.stop, JUDGED.stop + ONCE_MORE * len(JUDGED))
        ends = run_tables(problem, [tables[name] for name in near], more)
        again = _squares(exact, near, ends, more)
        squares |= {name: torch.cat([squares[name], again[name]]) for name in near}
    rows = [
        {"grid": name, "rmse": rmse_of(square), "samples": len(square)}
        for name, square in squares.items()
    ]
    name = min(near, key=lambda name: rmse_of(squares[name]))
    others = [other for other in near if other not in searched]
    if name in searched and others:
        standard = min(others, key=lambda name: rmse_of(squares[name]))
        if not nearer(squares[name], squares[standard], 1.0):
            name = standard
    return name, tables[name], rows


def _squares(
    exact: ExactSolution, names: Iterable[str], ends: Tensor, numbers: range
) -> dict[str, Tensor]:
    """Squared errors ``[B]`` of the ends ``[tables, B, ...]``, by name."""
    found = (ends - exact.solve(numbers)).double().square().flatten(2).mean(2)
    for square in found:
        require_finite(rmse_of(square), "the error of a grid")
    return dict(zip(names, found, strict=True))
