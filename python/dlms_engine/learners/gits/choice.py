"""The searched grids beside the standard ones, judged by where the student ends.

The search sees Euler jumps along the teacher's trajectory, not the student; on flows and discrete
times it can place times at which the student is ten times worse than on a uniform grid. So every
grid that was tried and every standard one, with and without an analytical first step, is run, and
the one that ends nearest to the model's exact solution is kept: a searched one where it is nearer
than every standard one beyond chance. Those that chance could have put first are run on more samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from ...processes import Process
from ...solvers.table import SolverTable
from ...support.values import require_finite
from ..start import ExactSolution, SamplingProblem, run_tables
from ..start.nearer import contest, nearer, rmse_of
from ..training.conclude import standard_tables
from .settings import GitsSettings

JUDGED = range(1 << 23, (1 << 23) + 512)
"""Numbers of the samples that grids are compared on, apart from those of the search."""
FIRST_JUDGED = 128
"""How many of them all grids are compared on; those that are tied go on."""


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
    standard = standard_students(problem.process, settings)
    judge = _Judge(problem, {**searched, **standard})
    squares, near = contest(searched, judge, FIRST_JUDGED, len(JUDGED))
    name = near[0]
    if standard:
        found, near = contest(standard, judge, FIRST_JUDGED, len(JUDGED))
        squares |= found
        for one in (name, near[0]):  # on all samples: a few of them hold most of the error
            squares[one] = judge.on_all(one, squares[one])
        if not nearer(squares[name], squares[near[0]]):
            name = near[0]
    rows = [
        {"grid": grid, "rmse": rmse_of(square), "samples": len(square)}
        for grid, square in squares.items()
    ]
    return name, judge.tables[name], rows


class _Judge:
    """Squared errors ``[B]`` of the ends of tables, on samples numbered from the first of ``JUDGED``."""

    def __init__(self, problem: SamplingProblem, tables: dict[str, SolverTable]) -> None:
        self.tables = tables
        self._problem = problem
        self._exact = ExactSolution(problem)
        self._exact.prove()
        self._targets: dict[range, Tensor] = {}

    def __call__(self, names: list[str], numbers: range) -> dict[str, Tensor]:
        judged = range(JUDGED.start + numbers.start, JUDGED.start + numbers.stop)
        ends = run_tables(self._problem, [self.tables[name] for name in names], judged)
        found = self._squares(ends, judged)
        steps = self._exact.table().nfe
        if self._exact.prove(min(map(rmse_of, found))).steps != steps:
            self._targets.clear()
            found = self._squares(ends, judged)
        return dict(zip(names, found, strict=True))

    def on_all(self, name: str, squares: Tensor) -> Tensor:
        """``squares`` of the first samples, and of those that are left."""
        left = range(len(squares), len(JUDGED))
        return torch.cat([squares, self([name], left)[name]]) if left else squares

    def _squares(self, ends: Tensor, judged: range) -> list[Tensor]:
        if judged not in self._targets:
            self._targets[judged] = self._exact.solve(judged)
        found = (ends - self._targets[judged]).double().square().flatten(2).mean(2)
        for square in found:
            require_finite(rmse_of(square), "the error of a grid")
        return list(found)
