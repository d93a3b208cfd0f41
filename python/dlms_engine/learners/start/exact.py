"""The exact solution of the probability-flow ODE, with the proof that it is exact.

No solver and no grid is the accurate one on every model: with 24 evaluations DPM-Solver++(3M) on
the polynomial grid is far from converged on a rectified flow. So several are run, the two that agree
best are refined until they agree with each other and with themselves at half the steps, and what they
differ by is kept with every result that was measured against them. The two are of different solvers
*and* grids: on one grid two solvers share its error and agree while both are wrong.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...processes import Process
from ...solvers import make_solver
from ...solvers.registry import standard_grids
from ...solvers.table import SolverTable
from ...support.transfer import host_numbers
from .problem import SamplingProblem
from .shared_runs import SharedRuns

_log = logging.getLogger("dlms_engine")

ACCURATE_SOLVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpm_solver_pp", {"order": 3}),
    ("unipc", {"order": 3, "variant": "bh2"}),
    ("ipndm_v", {"order": 4}),
)
"""High orders of three families; two of them must agree."""
FIRST_STEPS = 24
MOST_STEPS = 384
EXACT_SHARE = 1 / 5
"""Largest disagreement, as a share of the error that is measured against the solution."""


@dataclass(frozen=True)
class Proof:
    """How exact an exact solution is.

    Attributes:
        solver, grid: what computes it; ``steps`` its evaluations.
        check: the second solver and its grid.
        disagreement: RMSE between the two at ``steps``, or ``coarser`` where that is more: what
            remains of a first-order error is as large as what the last doubling removed.
        coarser: RMSE between the solution and the same with half the steps.
        against: the smallest error that was to be measured.
        samples: how many samples this was found on.
        calls: network evaluations of one sample that it took.
    """

    solver: str
    grid: str
    steps: int
    check: str
    disagreement: float
    coarser: float
    against: float
    samples: int
    calls: int

    @property
    def holds(self) -> bool:
        """Whether the disagreement is under a fifth of the error it is to measure."""
        return self.disagreement <= EXACT_SHARE * self.against

    def table(self, process: Process, steps: int | None = None) -> SolverTable:
        """The solver of the solution, with the proved number of steps or another one."""
        return _Accurate(self.solver, self.grid).table(process, steps or self.steps)

    def line(self) -> str:
        """One line of a report."""
        share = self.disagreement / self.against if self.against else float("inf")
        verdict = "" if self.holds else ": NOT PROVED, errors below this mean little"
        return (
            f"exact solution: {self.solver}/{self.grid}, {self.steps} evaluations; "
            f"{self.check} differs by {self.disagreement:.2g} "
            f"({100 * share:.0f} % of the smallest error){verdict}"
        )


@dataclass(frozen=True)
class _Accurate:
    """One solver on one kind of grid, with any number of steps."""

    solver: str
    grid: str

    def table(self, process: Process, steps: int) -> SolverTable:
        times = standard_grids(process)[self.grid](process, steps)
        return make_solver(self.solver, process, times, **dict(ACCURATE_SOLVERS)[self.solver])

    def __str__(self) -> str:
        return f"{self.solver}/{self.grid}"


class ExactSolution:
    """Solves to convergence; ``prove`` finds how, ``solve`` does it.

    Args:
        problem: the model.
        samples: samples to prove it on.
        most_steps: where refinement gives up.
        first_steps: evaluations of the first comparison.
    """

    FIRST = 1 << 20
    """Number of the first sample of the proof, apart from those of training and validation."""

    def __init__(
        self,
        problem: SamplingProblem,
        *,
        samples: int = 8,
        first_steps: int = FIRST_STEPS,
        most_steps: int = MOST_STEPS,
    ) -> None:
        self.problem = problem
        self._numbers = range(self.FIRST, self.FIRST + samples)
        self._first, self._most = first_steps, most_steps
        self._pair: tuple[_Accurate, _Accurate] | None = None
        self._ends: dict[tuple[_Accurate, int], Tensor] = {}
        self.proof: Proof | None = None
        self._restored = 0  # steps up to which the evaluations are among those of a kept proof

    def prove(
        self, error: float | None = None, *, share: float = EXACT_SHARE, most: float = math.inf
    ) -> Proof:
        """Refines until two solvers differ by less than ``share * error``.

        Args:
            error: the smallest error to be measured; None stops at the first comparison.
            most: steps that a solution may take beyond those it has; where these are too few, what is
                reached counts, without a warning.
        """
        calls = self.problem.calls
        if self._pair is None:
            self._pair = self._choose()
        steps = self.proof.steps if self.proof is not None else 2 * self._first
        while True:
            between, coarser = self._compare(steps)
            disagreement = max(between, coarser)
            enough = error is None or disagreement <= share * error
            if enough or 2 * steps > min(self._most, most):
                break
            steps *= 2
        first, second = self._pair
        spent = self.problem.calls - calls + (self.proof.calls if self.proof else 0)
        against = float("inf") if error is None else error
        self.proof = Proof(
            first.solver, first.grid, steps, str(second), disagreement, coarser, against,
            len(self._numbers), spent,
        )  # fmt: skip
        if not self.proof.holds and 2 * steps > self._most:
            _log.warning("%s", self.proof.line())
        return self.proof

    def against(self, error: float) -> Proof:
        """The proof restated for a smaller error, without new evaluations."""
        assert self.proof is not None
        self.proof = dataclasses.replace(self.proof, against=error)
        return self.proof

    def table(self) -> SolverTable:
        """The solver that gives the solution."""
        if self.proof is None:
            self.prove()
        assert self.proof is not None
        return self.proof.table(self.problem.process)

    def solve(self, numbers: range) -> Tensor:
        """End states ``[B, ...]`` of the samples ``numbers``."""
        return run_tables(self.problem, [self.table()], numbers)[0]

    def restore(self, proof: Proof) -> None:
        """Takes over a proof that was kept; what it took is not counted again."""
        check = proof.check.split("/")
        self._pair = _Accurate(proof.solver, proof.grid), _Accurate(check[0], check[1])
        self.proof, self._restored = proof, proof.steps

    # -- finding it ---------------------------------------------------------------------------

    def _end(self, accurate: _Accurate, steps: int) -> Tensor:
        key = accurate, steps
        if key not in self._ends:
            calls = self.problem.calls
            self._solve_all([key])
            if steps <= self._restored:
                self.problem.calls = calls
        return self._ends[key]

    def _solve_all(self, keys: Sequence[tuple[_Accurate, int]]) -> None:
        tables = [accurate.table(self.problem.process, steps) for accurate, steps in keys]
        for key, end in zip(keys, run_tables(self.problem, tables, self._numbers), strict=True):
            self._ends[key] = end

    def _choose(self) -> tuple[_Accurate, _Accurate]:
        """The two that agree best, of different solvers and grids; the steadier one of them first."""
        every = []
        for solver, _ in ACCURATE_SOLVERS:
            for grid in standard_grids(self.problem.process):
                candidate = _Accurate(solver, grid)
                try:
                    candidate.table(self.problem.process, self._first)
                except ValueError:  # a grid that ends where this solver cannot
                    continue
                every.append((candidate, self._first))
        self._solve_all(every)
        pairs = [
            (one[0], two[0], mean_square(self._ends[one], self._ends[two]))
            for i, one in enumerate(every)
            for two in every[i + 1 :]
            if one[0].solver != two[0].solver
            and (one[0].grid != two[0].grid or len({each.grid for each, _ in every}) == 1)
        ]
        errors = host_numbers([error for _, _, error in pairs])
        one, two, _ = pairs[errors.index(min(errors))]
        finer = 2 * self._first
        moved = [rmse(self._end(each, finer), self._ends[each, self._first]) for each in (one, two)]
        return (one, two) if moved[0] <= moved[1] else (two, one)

    def _compare(self, steps: int) -> tuple[float, float]:
        assert self._pair is not None
        first, second = self._pair
        end = self._end(first, steps)
        return (
            rmse(end, self._end(second, steps)),
            rmse(end, self._end(first, steps // 2)),
        )


def run_tables(problem: SamplingProblem, tables: Sequence[SolverTable], numbers: range) -> Tensor:
    """End states ``[tables, B, ...]`` of the samples ``numbers``."""
    parts: list[Tensor] = []
    runs = SharedRuns(tables)
    step = runs.chunk(problem.shape)
    for low in range(numbers.start, numbers.stop, step):
        part = range(low, min(low + step, numbers.stop))
        parts.extend(end for _, end in runs.ends(problem.predict, problem.noise(part), part.start))
    return torch.cat(parts, dim=1)


def rmse(one: Tensor, two: Tensor) -> float:
    """Root mean squared difference over samples and pixels."""
    return math.sqrt(host_numbers([mean_square(one, two)])[0])


def mean_square(one: Tensor, two: Tensor) -> Tensor:
    """Mean squared difference over samples and pixels, on their device."""
    return (one - two).double().square().mean()
