"""The best handcrafted solver of one model, by measuring all of them with fewer and fewer left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...processes import Process, as_float64
from ...solvers import make_solver
from ...solvers.common import Afs
from ...solvers.registry import SOLVERS, handcrafted
from ...solvers.table import SolverTable
from ...support.transfer import to_host
from .exact import EXACT_SHARE, ExactSolution, Proof
from .problem import SamplingProblem
from .rounds import FULL, IMPRECISE, LEAN, MOST_LEAN, SMALLER, WIDER, Rounds
from .shared_runs import SharedRuns

Effort = Literal["full", "lean"]
Report = Callable[[str], None]
LEAN_SOLVERS = ("ddim", "ipndm", "dpm_solver_pp", "unipc")


@dataclass(frozen=True)
class Candidate:
    """A handcrafted table and what it takes to make it again at other times."""

    label: str
    table: SolverTable

    @property
    def solver(self) -> str:
        return self.table.name

    def at(self, grid: Tensor, network_times: Tensor | None = None) -> SolverTable:
        """The same solver on another grid ``[steps + 1]``, its network called at other times.

        Raises:
            ValueError: the solver has stages between grid times, whose network times cannot be set.
        """
        options = {k: v for k, v in self.table.options.items() if k in SOLVERS[self.solver].options}
        if network_times is not None:
            options["network_times"] = network_times
        return make_solver(self.solver, self.table.process, grid, **options)

    @property
    def stages(self) -> int:
        """Network evaluations a step."""
        return SOLVERS[self.solver].evaluations_per_step


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate's endpoint RMSE to the exact solution, with its standard error."""

    candidate: Candidate
    rmse: float
    error: float
    samples: int


@dataclass(frozen=True)
class Start:
    """The best handcrafted solvers of a model at one number of evaluations.

    Attributes:
        ranking: measured candidates, best first; those of the last round lead.
        proof: of the exact solution they were measured against.
        calls: network evaluations of one sample that all this took.
        seconds: wall-clock time.
    """

    nfe: int
    ranking: tuple[MeasuredCandidate, ...]
    proof: Proof
    calls: int
    seconds: float

    @property
    def best(self) -> Candidate:
        return self.ranking[0].candidate

    def with_base(self, base: Candidate) -> Start:
        """The same with ``base`` in front, whatever was measured."""
        rest = tuple(m for m in self.ranking if m.candidate.label != base.label)
        same = [m for m in self.ranking if m.candidate.label == base.label]
        first = same[0] if same else MeasuredCandidate(base, float("nan"), float("nan"), 0)
        return dataclasses.replace(self, ranking=(first, *rest))

    def lines(self, most: int = 10) -> list[str]:
        """The table as text, best first."""
        width = max(len(m.candidate.label) for m in self.ranking[:most])
        head = f"{'solver/grid':{width}}  {'RMSE':>9}  {'+-':>8}  samples"
        rows = [
            f"{m.candidate.label:{width}}  {m.rmse:9.5f}  "
            f"{f'{m.error:8.5f}' if math.isfinite(m.error) else '-':>8}  {m.samples:7d}"
            for m in self.ranking[:most]
        ]
        return [head, *rows]

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "nfe": self.nfe,
            "ranking": [
                {
                    "solver": m.candidate.label,
                    "rmse": m.rmse,
                    "standard_error": m.error,
                    "samples": m.samples,
                }
                for m in self.ranking
            ],
            "exact": {**self.proof.__dict__, "holds": self.proof.holds},
            "calls": self.calls,
            "seconds": self.seconds,
        }


def handcrafted_candidates(
    process: Process, nfe: int, effort: Effort = "full", *, afs: bool = True
) -> list[Candidate]:
    """Every solver, grid and, with ``afs``, analytical first step of ``nfe`` evaluations."""
    kinds: tuple[Afs, ...] = (False, "dockhorn") if afs else (False,)
    every = [Candidate(label, table) for label, table in handcrafted(process, nfe, afs=kinds)]
    if effort == "full":
        return every
    return [
        c
        for c in every
        if c.solver in LEAN_SOLVERS and not (c.solver == "dpm_solver_pp" and "exact" in c.label)
    ]


def candidate_of(process: Process, nfe: int, label: str, *, afs: bool = True) -> Candidate:
    """The handcrafted solver called ``label``.

    Raises:
        ValueError: none of that many evaluations is.
    """
    every = handcrafted_candidates(process, nfe, afs=afs)
    for candidate in every:
        if candidate.label == label:
            return candidate
    near = ", ".join(c.label for c in every[:12])
    raise ValueError(
        f"base is {label!r}, expected 'best' or a label of {nfe} evaluations: {near}, ..."
    )


class Contest:
    """Every handcrafted solver of ``nfe`` evaluations, and how they are measured.

    Args:
        effort: ``"full"`` is the largest search of every solver that ``most`` evaluations of one sample
            pay for, or a lean one.
        more: evaluations of one sample for ``wider``; None is what a finite ``most`` leaves.

    Attributes:
        candidates: all of them that the effort looks at.
        plan: rounds of measuring.
        wider: rounds after it where its errors are imprecise; None is none.
        cost: network evaluations of one sample that ``plan`` takes, but for a refined proof.

    Raises:
        ValueError: no solver makes that many evaluations.
    """

    def __init__(
        self,
        process: Process,
        nfe: int,
        effort: Effort,
        *,
        afs: bool = True,
        most: float = math.inf,
        more: float | None = None,
    ) -> None:
        self.nfe = nfe
        self.wider: Rounds | None = None
        if effort == "lean" or not self._fits(process, (FULL, *SMALLER), "full", afs, most):
            self._fits(process, LEAN, "lean", afs, MOST_LEAN)
        elif self.plan is FULL:
            if more is None:
                more = most - self.cost if math.isfinite(most) else 0
            self.wider = next((p for p in WIDER if p.cost(self._first, nfe) <= more), None)

    def _fits(
        self, process: Process, plans: Sequence[Rounds], effort: Effort, afs: bool, most: float
    ) -> bool:
        """Takes the first of ``plans`` of at most ``most`` evaluations, else the last one."""
        self.candidates = handcrafted_candidates(process, self.nfe, effort, afs=afs)
        if not self.candidates:
            raise ValueError(f"no handcrafted solver makes exactly {self.nfe} evaluations")
        self._first = SharedRuns([c.table for c in self.candidates]).evaluations
        costs = [plan.cost(self._first, self.nfe) for plan in plans]
        number = next((i for i, each in enumerate(costs) if each <= most), len(plans) - 1)
        self.plan, self.cost = plans[number], costs[number]
        return self.cost <= most


def cost(process: Process, nfe: int, effort: Effort = "full", most: float = math.inf) -> int:
    """Network evaluations of one sample that the search takes, but for a refined proof and ``wider``."""
    return Contest(process, nfe, effort, most=most).cost


class Search:
    """Successive halving (Jamieson & Talwalkar 2016) over handcrafted tables.

    Every round measures what is left on more samples, the same for all, and keeps the best.
    """

    FIRST = 1 << 21
    """Number of the first sample, apart from those of proof, training and validation."""

    def __init__(
        self, problem: SamplingProblem, exact: ExactSolution, contest: Contest, say: Report
    ) -> None:
        self.problem, self.exact, self.contest, self.say = problem, exact, contest, say
        self._begin()

    def run(self) -> list[MeasuredCandidate]:
        """Measured candidates, best first."""
        ranked = self._rounds(self.contest.plan)
        best, wider = ranked[0], self.contest.wider
        if wider is None or not best.error > IMPRECISE * best.rmse:
            return ranked
        self.say(
            f"{best.samples} samples: RMSE {best.rmse:.4g} +- {best.error:.2g}, a few of them hold the "
            f"error: again on up to {wider.samples[-1]}"
        )
        self._begin()
        return self._rounds(wider)

    def _begin(self) -> None:
        self._left = self.contest.candidates
        self._squares: dict[str, list[float]] = {c.label: [] for c in self._left}
        self._done: list[MeasuredCandidate] = []

    def _rounds(self, plan: Rounds) -> list[MeasuredCandidate]:
        before = 0
        for samples, keep in zip(plan.samples, plan.keep, strict=True):
            self._measure(range(self.FIRST + before, self.FIRST + samples))
            ranked = sorted(map(self._measured, self._left), key=lambda m: m.rmse)
            if not before:
                self._sharpen(ranked[0].rmse, samples)
                ranked = sorted(map(self._measured, self._left), key=lambda m: m.rmse)
            self._done = [*ranked[keep:], *self._done]
            self._left = [m.candidate for m in ranked[:keep]]
            self.say(
                f"{samples} samples: best {ranked[0].candidate.label}, RMSE {ranked[0].rmse:.4g}; "
                f"{len(self._left)} of {len(ranked)} stay"
            )
            before = samples
        return [*ranked[: len(self._left)], *self._done]

    def _sharpen(self, smallest: float, samples: int) -> None:
        """More steps for the exact solution, if the best candidate comes near its uncertainty."""
        assert self.exact.proof is not None
        steps = self.exact.proof.steps
        proof = self.exact.prove(smallest, share=EXACT_SHARE / 2)
        if proof.steps == steps:
            return
        for values in self._squares.values():
            values.clear()
        self._measure(range(self.FIRST, self.FIRST + samples))

    def _measure(self, numbers: range) -> None:
        runs = SharedRuns([c.table for c in self._left] + [self.exact.table()])
        step = runs.chunk(self.problem.shape)
        for low in range(numbers.start, numbers.stop, step):
            part = range(low, min(low + step, numbers.stop))
            for _, ends in runs.ends(self.problem.predict, self.problem.noise(part), part.start):
                squares = to_host((ends[:-1] - ends[-1]).double().square().flatten(2).mean(2))
                for candidate, row in zip(self._left, squares.tolist(), strict=True):
                    self._squares[candidate.label].extend(row)

    def _measured(self, candidate: Candidate) -> MeasuredCandidate:
        squares = torch.tensor(self._squares[candidate.label], dtype=torch.float64, device="cpu")
        squares = squares.nan_to_num(nan=float("inf"))
        value, error = rmse_with_error(squares)
        return MeasuredCandidate(candidate, value, error, len(squares))


def rmse_with_error(squares: Sequence[float] | Tensor) -> tuple[float, float]:
    """Root of the mean and its standard error, from mean squares of every sample."""
    values = as_float64(squares)
    value = math.sqrt(float(values.mean()))
    if len(values) < 2 or not math.isfinite(value) or value == 0:
        return value, float("inf") if len(values) < 2 else 0.0
    return value, float(values.std()) / math.sqrt(len(values)) / (2 * value)
