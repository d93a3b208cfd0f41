"""The handcrafted solvers of one number of evaluations, and the plan by which they are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...processes import Process
from ...solvers import make_solver
from ...solvers.common import Afs
from ...solvers.registry import SOLVERS, handcrafted
from ...solvers.table import SolverTable
from .rounds import AGAIN, FULL, LEAN, MOST_LEAN, SMALLER, WIDER, Rounds
from .shared_runs import SharedRuns

Effort = Literal["full", "lean"]
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
        again: evaluations of one sample that all may take, ``more`` included; None is ``AGAIN`` times a
            finite ``most``; of a lean effort at most ``MOST_LEAN``.

    Attributes:
        candidates: all of them that the effort looks at.
        plan: rounds of measuring.
        cost: network evaluations of one sample that ``plan`` takes, but for a refined proof.
        more: evaluations of one sample that may follow ``plan``, to see whether a few samples hold the
            error, and where they do.

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
        again: float | None = None,
    ) -> None:
        self.nfe = nfe
        self.every = effort == "full" and self._fits(process, (FULL, *SMALLER), "full", afs, most)
        if not self.every:
            self._fits(process, LEAN, "lean", afs, MOST_LEAN)
        if again is None:
            again = AGAIN * most if math.isfinite(most) else 0.0
        if effort == "lean":
            again = min(again, MOST_LEAN)
        self.more = max(0.0, again - self.cost)

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

    def wider(self, samples: int, left: float, solving: int) -> Rounds | None:
        """Rounds of every solver that end on more than ``samples`` and take at most ``left`` evaluations,
        ``solving`` for the exact end of one sample.
        """
        if not self.every:
            return None
        fits = (
            plan
            for plan in WIDER
            if plan.samples[-1] > samples and plan.cost(self._first, self.nfe, solving) <= left
        )
        return next(fits, None)

    def as_thorough(self, solvers: int, samples: int) -> bool:
        """Whether ``plan`` measures no more than a search that ranked ``solvers``, the best of them on
        ``samples``.
        """
        return solvers >= len(self.candidates) and samples >= self.plan.samples[-1]


def cost(process: Process, nfe: int, effort: Effort = "full", most: float = math.inf) -> int:
    """Network evaluations of one sample that the search's plan takes, but for a refined proof."""
    return Contest(process, nfe, effort, most=most).cost
