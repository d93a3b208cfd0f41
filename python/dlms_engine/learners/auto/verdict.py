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
    ranked = finalists_of(start, settings)

    def held_out() -> range:
        each = sample_cost(settings.nfe, len(stages), exact.table().nfe)
        samples = settings.held_out
        while samples > PILOT and samples * each > max(budget.left(), 0.1 * budget.calls):
            samples -= max(1, samples // 8)
        return range(HELD_OUT_FIRST, HELD_OUT_FIRST + samples)

    def measure(numbers: range) -> tuple[tuple[MeasuredCandidate, ...], Tensor]:
        target = exact.solve(numbers)
        found = measured_on(problem, target, ranked, numbers) if ranked else ()
        if found:
            stages[0].policy = found[0].candidate.table
        measure_stages(problem, target, stages, numbers)
        return found, target

    # On a few first: all of them are solved once, as exactly as the smallest error asks for.
    numbers = held_out()
    if len(numbers) > 4 * PILOT and budget.share() < 1:
        measure(numbers[:PILOT])
        exact.prove(_smallest(stages))
        numbers = held_out()
    found, target = measure(numbers)
    again = len(numbers) * sample_cost(settings.nfe, len(stages), exact.table().nfe)
    if budget.share() < 1 and again < budget.left():
        assert exact.proof is not None
        steps = exact.proof.steps
        if exact.prove(_smallest(stages)).steps != steps:
            found, target = measure(numbers)
    new = range(numbers.stop, numbers.stop + MORE * len(numbers))
    others = [m.candidate.table for m in found[1 : 1 + OTHERS]]
    kept, compared = _kept(problem, exact, stages, others, numbers, new)
    if kept is stages[0] and len(found) > 1 and budget.share() < 1:
        pays = budget.left() - len(numbers) * (settings.nfe + 1)  # to measure another base
        more = with_what_is_left(problem, exact, found, new, pays)
        if more[0].candidate.label != found[0].candidate.label:
            kept.policy = more[0].candidate.table
            measure_stages(problem, target, [kept], numbers)
        found = more
    if not found:
        return start, kept, compared
    best = found[0].candidate
    if best.label != start.best.label:
        extra = found[0].samples - ranked[0].samples
        say(f"with {extra} samples more the best handcrafted solver is {best.label}")
    return start.with_base(best), kept, compared


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
