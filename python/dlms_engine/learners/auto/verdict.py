"""The end of a run: which handcrafted solver was the best, which stage is kept, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ...solvers.table import SolverTable
from ..start import ExactSolution, MeasuredCandidate, SamplingProblem, Start
from .budget import Budget
from .choose import HELD_OUT_FIRST, AutoStage, choose_stage, measure_stages, measured_on
from .settings import AutoSettings
from .shares import FINALISTS, MORE, OTHERS, PILOT, sample_cost
from .tail import Comparison, compare_with_base


class Judge:
    """Chooses among ``stages``; the first becomes the best handcrafted solver that is found.

    Args:
        start: the search for the best handcrafted solver; its last round names the finalists.
        stages: base first, the simpler before the more complex.
        say: is called with a line of text.
    """

    def __init__(
        self,
        problem: SamplingProblem,
        start: Start,
        exact: ExactSolution,
        stages: list[AutoStage],
        settings: AutoSettings,
        budget: Budget,
        say: Callable[[str], None],
    ) -> None:
        self.problem, self.start, self.exact, self.stages = problem, start, exact, stages
        self.settings, self.budget, self.say = settings, budget, say
        self.finalists = finalists_of(start, settings)

    def verdict(self) -> tuple[Start, AutoStage, Comparison | None]:
        """The start with the best handcrafted solver in front, the stage that is kept, and how it
        compares with that solver; None where it is kept itself.
        """
        numbers, target, ranked = self._measured()
        new = range(numbers.stop, numbers.stop + MORE * len(numbers))
        others = [m.candidate.table for m in ranked[1 : 1 + OTHERS]]
        kept, compared = self._kept(others, numbers, new)
        if kept is self.stages[0] and len(ranked) > 1 and self.budget.share() < 1:
            pays = self.budget.left() - len(numbers) * (self.settings.nfe + 1)  # another base
            more = with_what_is_left(self.problem, self.exact, ranked, new, pays)
            if more[0].candidate.label != ranked[0].candidate.label:
                kept.policy = more[0].candidate.table
                measure_stages(self.problem, target, [kept], numbers)
            ranked = more
        return self._with_best(ranked), kept, compared

    def _measured(self) -> tuple[range, Tensor, tuple[MeasuredCandidate, ...]]:
        """Held-out samples, their exact ends, and the finalists, best first, all stages measured."""
        # On a few first: all of them are solved once, as exactly as the smallest error asks for.
        numbers = self._held_out()
        if len(numbers) > 4 * PILOT and self.budget.share() < 1:
            self._measure(numbers[:PILOT])
            self.exact.prove(_smallest(self.stages))
            numbers = self._held_out()
        target, ranked = self._measure(numbers)
        if self.budget.share() < 1 and len(numbers) * self._cost() < self.budget.left():
            assert self.exact.proof is not None
            steps = self.exact.proof.steps
            if self.exact.prove(_smallest(self.stages)).steps != steps:
                target, ranked = self._measure(numbers)
        return numbers, target, ranked

    def _cost(self) -> int:
        return sample_cost(self.settings.nfe, len(self.stages), self.exact.table().nfe)

    def _held_out(self) -> range:
        """As many as the budget pays for."""
        samples = self.settings.held_out
        pays = max(self.budget.left(), 0.1 * self.budget.calls)
        while samples > PILOT and samples * self._cost() > pays:
            samples -= max(1, samples // 8)
        return range(HELD_OUT_FIRST, HELD_OUT_FIRST + samples)

    def _measure(self, numbers: range) -> tuple[Tensor, tuple[MeasuredCandidate, ...]]:
        target = self.exact.solve(numbers)
        ranked = self.finalists
        if ranked:
            ranked = measured_on(self.problem, target, ranked, numbers)
            self.stages[0].policy = ranked[0].candidate.table
        measure_stages(self.problem, target, self.stages, numbers)
        return target, ranked

    def _kept(
        self, others: Sequence[SolverTable], held: range, new: range
    ) -> tuple[AutoStage, Comparison | None]:
        """The choice, if it is nearer on the samples ``new`` too; else the one without it."""
        assert self.exact.proof is not None
        left, base = list(self.stages), self.stages[0]
        while True:
            best = choose_stage(left, self.exact.proof.disagreement)
            if best is base:
                return best, None
            pair = (base, best)
            compared = compare_with_base(self.problem, self.exact, pair, others, held, new)
            if compared.ratio > 1:
                return best, compared
            left = [stage for stage in left if stage is not best]

    def _with_best(self, ranked: Sequence[MeasuredCandidate]) -> Start:
        if not ranked:
            return self.start
        best = ranked[0].candidate
        if best.label != self.start.best.label:
            extra = ranked[0].samples - self.finalists[0].samples
            self.say(f"with {extra} samples more the best handcrafted solver is {best.label}")
        return self.start.with_base(best)


def finalists_of(start: Start, settings: AutoSettings) -> tuple[MeasuredCandidate, ...]:
    """The best of the search's last round; none where the base is given."""
    last = start.ranking[0].samples
    every = [m for m in start.ranking if m.samples == last and math.isfinite(m.rmse)]
    return tuple(every[:FINALISTS]) if settings.base == "best" else ()


def with_what_is_left(
    problem: SamplingProblem,
    exact: ExactSolution,
    finalists: tuple[MeasuredCandidate, ...],
    numbers: range,
    pays: float,
) -> tuple[MeasuredCandidate, ...]:
    """Handcrafted solvers, where one of them is the result, on as many of the samples ``numbers`` as
    ``pays`` evaluations solve; best first.
    """
    each = exact.table().nfe + sum(m.candidate.table.nfe + 1 for m in finalists)
    numbers = numbers[: max(0, int(min(pays / each, len(numbers))))]
    if not numbers:
        return finalists
    return measured_on(problem, exact.solve(numbers), finalists, numbers)


def _smallest(stages: Sequence[AutoStage]) -> float:
    return math.sqrt(min(float(stage.squares.mean()) for stage in stages))
