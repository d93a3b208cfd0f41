"""How a run ends: what was learned beside its base and its teacher, on samples nobody trained on.

A method charged step by step, or against a teacher that is itself far from the solution, can end behind
the handcrafted solver that it improves. So the base is run on every standard grid, and the learned
solver is kept where it is nearer than the best of them beyond chance, or where ``keep="learned"``, as the
papers' presets have it, asks for the method to the letter: the report says so then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...engine.sampler import Sampler
from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...processes import Process
from ...solvers import SOLVERS, make_solver
from ...solvers.policy import Policy
from ...solvers.registry import label_of, standard_grids
from ...solvers.table import SolverTable
from ...support.transfer import to_host
from ...support.values import json_number
from ..options import RunOptions
from ..start import SamplingProblem
from ..start.nearer import contest, nearer, rmse_of
from .noise import numbered_as_before, tell_first_sample
from .validation import exact_solution

_log = logging.getLogger("dlms_engine")

Keep = Literal["best", "learned"]
EndOf = Callable[[Tensor, dict[str, Any]], Tensor]
"""(start states ``[B, ...]``, conditions) -> end states."""

_SAMPLES, _BATCH = 64, 16
_FIRST = 1 << 22
"""Number of the first sample, apart from those of proof, start, training and validation."""
_STEPS = 48


@dataclass(frozen=True)
class Beside:
    """What a learned solver is measured beside.

    Attributes:
        bases: grid, with or without its first step -> handcrafted solver that the method improves.
        teacher: the end of its teacher, for methods with one that is not the exact solution.
        finer: the setting that brings the teacher nearer to the solution.
        keep: "best", or "learned" whatever the base reaches.
        most: samples that may be run to tell the nearest; half of those trained on cost less than they.
    """

    bases: Mapping[str, SolverTable] = field(default_factory=dict)
    teacher: EndOf | None = None
    finer: str = ""
    keep: Keep = "best"
    most: int = 256


def standard_tables(
    process: Process, solver: str, nfe: int, options: Mapping[str, Any], afs: tuple[bool, ...]
) -> dict[str, SolverTable]:
    """``solver`` with ``nfe`` evaluations on every standard grid where it exists, by name."""
    stages = SOLVERS[solver].evaluations_per_step
    found = {}
    for name, grid in standard_grids(process).items():
        for first in afs:
            steps, odd = divmod(nfe + int(first), stages)
            if odd or steps < 1:
                continue
            try:
                table = make_solver(solver, process, grid(process, steps), **options, afs=first)
            except ValueError:  # a grid that starts or ends where this solver cannot
                continue
            if table.nfe == nfe:
                found[f"{name}/afs-dockhorn" if first else name] = table
    return found


class Measure:
    """Squared distances to the exact solution, one a sample."""

    def __init__(self, denoiser: Denoiser, problem: SamplingProblem) -> None:
        self._denoiser, self._problem = denoiser, problem
        self._targets: dict[int, Tensor] = {}

    def squares(self, run: EndOf, numbers: range) -> Tensor:
        """float64 ``[len(numbers)]`` on the CPU; infinite where an end is not finite."""
        parts = []
        for low in range(_FIRST + numbers.start, _FIRST + numbers.stop, _BATCH):
            numbers = range(low, low + _BATCH)
            conditions = self._problem.condition(numbers)
            noise = self._problem.noise(numbers)
            if low not in self._targets:
                tell_first_sample(self._denoiser, low)
                self._targets[low] = exact_solution(self._denoiser, noise, _STEPS, **conditions)
            tell_first_sample(self._denoiser, low)
            difference = run(noise, conditions) - self._targets[low]
            parts.append(difference.double().square().flatten(1).mean(1))
        return to_host(torch.cat(parts)).nan_to_num(nan=math.inf)

    def contest(self, learned: EndOf, beside: Beside) -> dict[str, Tensor]:
        """Squared distances of ``learned``, as "", and of each base that may be the nearest."""
        tables = beside.bases.items()
        runs = {"": learned, **{name: _running(self._denoiser, table) for name, table in tables}}

        def measure(names: list[str], numbers: range) -> dict[str, Tensor]:
            return {name: self.squares(runs[name], numbers) for name in names}

        if beside.keep == "learned":
            return measure(list(runs), range(_SAMPLES))
        most = min(max(beside.most, 4 * _SAMPLES), 16 * _SAMPLES)
        found, _ = contest(runs, measure, _SAMPLES, most, [""])
        return {name: square for name, square in found.items() if len(square) == len(found[""])}


@torch.no_grad()
def concluded(
    solver: DistilledSolver,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    options: RunOptions,
    beside: Beside,
) -> DistilledSolver:
    """``solver`` with ``best["compared"]``, and the nearest base as its policy where that is better.

    ``compared`` has the RMSE to the exact solution of ``learned``, ``base`` (its label; None without any)
    and ``teacher``, the number of ``samples``, and what was ``kept``.
    """
    problem = SamplingProblem(denoiser, shape, options.conditions or None, seed=options.seed)
    measure = Measure(denoiser, problem)
    with numbered_as_before(denoiser):
        squares = measure.contest(_running(denoiser, solver.policy), beside)
        learned = squares.pop("")
        compared: dict[str, Any] = {"samples": len(learned), "learned": rmse_of(learned)}
        compared |= {"kept": "learned", "base": None, "base_rmse": None, "teacher": None}
        if squares:
            name = min(squares, key=lambda name: rmse_of(squares[name]))
            base = squares[name]
            label = label_of(beside.bases[name], name.split("/")[0])
            compared |= {"base": label, "base_rmse": rmse_of(base)}
            if beside.keep == "best" and not nearer(learned, base, 1.0):
                compared["kept"] = "base"
                solver.policy = beside.bases[name]
                solver.best |= {"score": rmse_of(base), "set": f"the base, {label}"}
        if beside.teacher is not None:
            compared["teacher"] = rmse_of(measure.squares(beside.teacher, range(len(learned))))
    solver.best["compared"] = {key: json_number(value) for key, value in compared.items()}
    for line in compared_lines(compared, beside.finer):
        _log.warning("%s: %s", solver.method, line)
    return solver


def compared_lines(compared: Mapping[str, Any], finer: str = "") -> list[str]:
    """What a user should know of the comparison; nothing where all is well."""
    lines, learned, base = [], compared["learned"], compared["base_rmse"]
    if compared["kept"] == "base":
        lines.append(
            f"its base, {compared['base']}, is kept (RMSE {base:.4g} to the exact solution): what was "
            f"learned ({learned:.4g}) is not nearer beyond chance"
        )
    elif base is not None and base < learned:
        lines.append(
            f"RMSE {learned:.4g}, worse than its base, {compared['base']} ({base:.4g}), which needs no "
            "training"
        )
    teacher = compared["teacher"]
    if teacher is not None and teacher >= min(learned, learned if base is None else base):
        lines.append(
            f"its teacher ends {teacher:.4g} from the exact solution, no better than the student's "
            f"{min(learned, learned if base is None else base):.4g}: a finer one has {finer}"
        )
    return lines


def _running(denoiser: Denoiser, policy: Policy) -> EndOf:
    sampler = Sampler(denoiser, policy, check_finite=False)

    def run(noise: Tensor, conditions: dict[str, Any]) -> Tensor:
        end = sampler(noise, **conditions)
        assert isinstance(end, Tensor)
        return end

    return run
