"""The searched grids beside the standard ones, judged by where the student ends.

The search sees Euler jumps along the teacher's trajectory, not the student; on flows and discrete
times it can place times at which the student is ten times worse than on a uniform grid. So every
grid that was tried and every standard one, with and without an analytical first step, is run, and
the one that ends nearest to the model's exact solution is kept: a searched one where it is nearer
than every standard one beyond chance.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...models.denoiser import Denoiser
from ...processes import Process
from ...solvers.table import SolverTable
from ...support.values import require_finite
from ..start import ExactSolution, SamplingProblem, rmse, run_tables
from ..start.nearer import nearer
from ..training.conclude import standard_tables
from .settings import GitsSettings

JUDGED = range(1 << 23, (1 << 23) + 128)
"""Numbers of the samples that grids are compared on, apart from those of the search."""


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

    def errors() -> list[float]:
        target = exact.solve(JUDGED)
        return [require_finite(rmse(end, target), "the error of a grid") for end in ends]

    found = errors()
    assert exact.proof is not None
    steps = exact.proof.steps
    if exact.prove(min(found)).steps != steps:
        found = errors()
    rows = [{"grid": name, "rmse": error} for name, error in zip(tables, found, strict=True)]
    names, target = list(tables), exact.solve(JUDGED)

    def best_of(places: range) -> int:
        return min(places, key=found.__getitem__)

    def squares(place: int) -> Tensor:
        return (ends[place] - target).double().square().flatten(1).mean(1)

    best = best_of(range(len(names)))
    if best < len(searched) < len(names):
        standard = best_of(range(len(searched), len(names)))
        if not nearer(squares(best), squares(standard), 1.0):
            best = standard
    return names[best], tables[names[best]], rows
