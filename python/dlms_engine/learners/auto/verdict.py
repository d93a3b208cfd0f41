"""The end of a run: which handcrafted solver was the best, which stage is kept, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ...solvers.table import SolverTable
from ..start import ExactSolution, MeasuredCandidate, SamplingProblem, Start
from .budget import Budget
from .choose import HELD_OUT_FIRST, AutoStage, best_of, choose_stage, measure_stages
from .settings import AutoSettings
from .shares import FINALISTS, MORE, OTHERS, PILOT, sample_cost
from .tail import Comparison, compare_with_base


def finalists_of(start: Start, settings: AutoSettings) -> tuple[MeasuredCandidate, ...]:
    """The best of the search's last round; the given base alone where there is one."""
    last = start.ranking[0].samples
    every = [m for m in start.ranking if m.samples == last and math.isfinite(m.rmse)]
    return tuple(every[:FINALISTS]) if settings.base == "best" else ()


def judge(
    problem: SamplingProblem,
    start: Start,
    exact: ExactSolution,
    stages: list[AutoStage],
    settings: AutoSettings,
    budget: Budget,
    say: Callable[[str], None],
) -> tuple[Start, AutoStage, Comparison | None]:
    """The start with the best handcrafted solver in front, the stage that is kept, and how it compares
    with that solver; ``stages[0]`` becomes it. None where it is kept itself.
    """
    finalists = finalists_of(start, settings)

    def held_out() -> range:
        each = sample_cost(settings.nfe, len(stages), exact.table().nfe)
        samples = settings.held_out
        while samples > PILOT and samples * each > max(budget.left(), 0.1 * budget.calls):
            samples -= max(1, samples // 8)
        return range(HELD_OUT_FIRST, HELD_OUT_FIRST + samples)

    def measure(numbers: range) -> Start:
        target = exact.solve(numbers)
        best = best_of(problem, target, finalists, numbers) if finalists else start.best
        stages[0].policy = best.table
        measure_stages(problem, target, stages, numbers)
        return start.with_base(best)

    # On a few first: all of them are solved once, as exactly as the smallest error asks for.
    numbers = held_out()
    if len(numbers) > 4 * PILOT and budget.share() < 1:
        measure(numbers[:PILOT])
        exact.prove(_smallest(stages))
        numbers = held_out()
    found = measure(numbers)
    again = len(numbers) * sample_cost(settings.nfe, len(stages), exact.table().nfe)
    if budget.share() < 1 and again < budget.left():
        assert exact.proof is not None
        steps = exact.proof.steps
        if exact.prove(_smallest(stages)).steps != steps:
            found = measure(numbers)
    if found.best.label != start.best.label:
        say(f"with {len(numbers)} samples more the best handcrafted solver is {found.best.label}")
    new = range(numbers.stop, numbers.stop + MORE * len(numbers))
    others = [m.candidate.table for m in finalists if m.candidate.label != found.best.label]
    return found, *_kept(problem, exact, stages, others[:OTHERS], numbers, new)


def _smallest(stages: Sequence[AutoStage]) -> float:
    return math.sqrt(min(float(stage.squares.mean()) for stage in stages))


def _kept(
    problem: SamplingProblem,
    exact: ExactSolution,
    stages: Sequence[AutoStage],
    others: Sequence[SolverTable],
    held: range,
    new: range,
) -> tuple[AutoStage, Comparison | None]:
    """The choice, if it is nearer on the samples ``new`` too; else the one without it."""
    assert exact.proof is not None
    left = list(stages)
    while True:
        best = choose_stage(left, exact.proof.disagreement)
        if best is stages[0]:
            return best, None
        compared = compare_with_base(problem, exact, (stages[0], best), others, held, new)
        if compared.ratio > 1:
            return best, compared
        left = [stage for stage in left if stage is not best]
