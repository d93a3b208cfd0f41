"""Settings of GITS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...solvers import SOLVERS
from ..training.coerce import check_choices
from ..training.start_times import GridSource

Metric = Literal["dev", "l2", "l1"]


@dataclass(frozen=True)
class GitsSettings:
    """Settings of the search and of the table its grid feeds.

    Attributes:
        nfe: network evaluations of the student.
        solver: any maker of ``dlms_engine.solvers``; ``order`` and ``options`` are its settings.
        order: the solver's order; None for its default.
        options: further keyword arguments of the maker, e.g. ``{"prediction": "noise"}``.
        afs: analytical first step of the student: one grid point more for the same evaluations,
            inserted where the student's end is nearest to the teacher's. The teacher never uses it.
        points: times of the teacher's grid (published: 21 and 61).
        grid: the teacher's grid: a name, explicit times or another solver's file; None for polynomial,
            uniform in time on flows.
        teacher: solver of the teacher trajectory; ``teacher_order`` its order, None for the
            default.
        metric: of a jump from i that should reach X_j: "l1" or "l2" distance, or "dev" (published),
            the difference of the distances from the straight chord between the trajectory's ends
            (signed, so that costs can be negative).
        gamma: weight gamma^k of the k-th jump's cost. Several are tried and the one whose student
            ends nearest to the teacher is kept.
        batch: trajectories at a time.
        candidates: "all" also tries the student on every standard grid, with and without an
            analytical first step, and keeps what ends nearest to the exact solution; "searched"
            (published) takes the search's own best.
    """

    nfe: int = 5
    solver: str = "ipndm"
    order: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    afs: bool = False
    points: int = 61
    grid: GridSource | None = None
    teacher: str = "ipndm"
    teacher_order: int | None = None
    metric: Metric = "dev"
    gamma: float | Sequence[float] = 1.15
    batch: int = 64
    candidates: Literal["all", "searched"] = "all"

    def __post_init__(self) -> None:
        for name in ("solver", "teacher"):
            if getattr(self, name) not in SOLVERS:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {sorted(SOLVERS)}"
                )
        check_choices(self)
        if not self.gammas or not all(g > 0 for g in self.gammas):
            raise ValueError(f"gamma is {self.gamma!r}, expected positive numbers")
        if (self.nfe + int(self.afs)) % self._cost:
            raise ValueError(
                f"nfe is {self.nfe} with afs={self.afs}: {self.solver} takes {self._cost} "
                "evaluations a step, one less with AFS"
            )
        if self.jumps < 1 or self.batch < 1:
            raise ValueError(f"nfe is {self.nfe} and batch {self.batch}: expected a jump")
        if self.points - 1 < self.steps:
            raise ValueError(f"points is {self.points}, expected more than {self.steps} steps")

    @property
    def _cost(self) -> int:
        return SOLVERS[self.solver].evaluations_per_step

    @property
    def gammas(self) -> tuple[float, ...]:
        return tuple(self.gamma) if isinstance(self.gamma, Sequence) else (float(self.gamma),)

    @property
    def steps(self) -> int:
        """Steps of the student."""
        return (self.nfe + int(self.afs)) // self._cost

    @property
    def jumps(self) -> int:
        """Steps that the dynamic programme places; the one of AFS is inserted afterwards."""
        return self.steps - int(self.afs)
