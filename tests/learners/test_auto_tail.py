"""The claimed ratio where a few samples hold most of the error; the best handcrafted solver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlms_engine.learners.auto.choose import AutoStage, measure_stages, measured_on, ratio
from dlms_engine.learners.auto.tail import Picked, compare_with_base, stratified
from dlms_engine.learners.auto.verdict import with_what_is_left
from dlms_engine.learners.start import (
    ExactSolution,
    MeasuredCandidate,
    SamplingProblem,
    find_start,
    handcrafted_candidates,
    run_tables,
)
from dlms_engine.learners.start.contest import Contest
from dlms_engine.learners.start.rounds import AGAIN, LEAN, SMALLER
from dlms_engine.learners.start.search import Search
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM


def two_modes(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x] of values near -1 and 1: a start near 0 may end at either."""
    variance = t.reshape(-1, 1) ** 2
    return (0.01 * x + variance * torch.tanh(x / (0.01 + variance))) / (0.01 + variance)


def labelled(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return two_modes(x - shift, t) + shift


def rarely_sharp(x: Tensor, t: Tensor, sharp: Tensor) -> Tensor:
    """One Gaussian; where ``sharp``, two modes, where five evaluations err a hundred times more."""
    variance = t.reshape(-1, 1) ** 2
    return torch.where(sharp, 4 * two_modes(x / 4, t / 4), x / (1 + variance))


def test_the_interval_knows_of_modes_that_no_held_out_sample_ends_in() -> None:
    """On some mixtures 12 was claimed and 1.9 was true: one sample in a hundred ends in another mode."""
    conditions = {"sharp": torch.arange(64)[:, None] == 63}
    problem = SamplingProblem(Denoiser(rarely_sharp, EDM(), "data"), (1,), conditions)
    exact = ExactSolution(problem, most_steps=48)
    exact.prove(0.01)
    every = {c.label: c.table for c in handcrafted_candidates(problem.process, 5)}
    base, stage = (
        AutoStage(name, every[label])
        for name, label in (("base", "ddim/time_quadratic"), ("table", "ipndm3/time_quadratic"))
    )
    stages, held, whole = [base, stage], range(32), range(1024)
    measure_stages(problem, exact.solve(whole), stages, whole)
    true = ratio(base, stage)[0]
    measure_stages(problem, exact.solve(held), stages, held)
    others = [every["unipc2/logsnr"]]
    found = compare_with_base(problem, exact, (base, stage), others, held, range(32, 288))
    assert found.low <= true <= found.high, (true, found)
    assert found.samples == 288 and found.solved == 48
    _, low, high = ratio(base, stage)
    assert not low <= true <= high, (true, low, high)  # planted: of the held-out samples alone


def _true_errors(problem: SamplingProblem, fresh: range) -> dict[str, float]:
    """RMSE of every handcrafted solver of six evaluations on ``fresh``, by label."""
    exact = ExactSolution(problem, most_steps=96)
    exact.prove(0.01)
    candidates = handcrafted_candidates(EDM(), 6)
    ends = run_tables(problem, [c.table for c in candidates], fresh).double()
    errors = (ends - exact.solve(fresh)).square().flatten(1).mean(1).sqrt().tolist()
    return dict(zip((c.label for c in candidates), errors, strict=True))


def test_the_search_goes_on_where_a_few_samples_hold_the_error() -> None:
    """Of 64 samples so few end in another mode that a solver eight times worse looks like the best."""
    shifted = Denoiser(lambda x, t: two_modes(x - 0.3, t) + 0.3, EDM(), "data")
    problem = SamplingProblem(shifted, (1,))
    true = _true_errors(problem, range(4096))

    def best(**limit: float) -> float:
        start, _ = find_start(problem, 6, effort="full", **limit)
        return true[start.best.label] / min(true.values())

    assert best(most=400_000) < 1.1 and best(again=400_000) < 1.1
    assert best() > 1.5  # planted: no further search
    contest = Contest(EDM(), 6, "full", most=40_000)
    assert contest.wider(64, contest.more, 48) is None


def test_a_rich_budget_sees_what_no_sample_of_the_first_rounds_shows() -> None:
    """The error of 64 samples looked precise where one in a hundred ends in another mode."""
    first = Search.FIRST
    conditions = {"sharp": torch.arange(100)[:, None] == (first + 90) % 100}
    problem = SamplingProblem(Denoiser(rarely_sharp, EDM(), "data"), (1,), conditions)
    shown = [bool(problem.condition([first + i])["sharp"]) for i in range(200)]
    assert [i for i, each in enumerate(shown) if each] == [90, 190]
    true = _true_errors(problem, range(1000))

    def best(again: float) -> float:
        lines = list[str]()
        start, _ = find_start(problem, 6, effort="full", again=again, say=lines.append)
        assert any("a few of them hold the error" in line for line in lines) == (again > 0)
        return true[start.best.label] / min(true.values())

    assert best(600_000) < 1.1
    assert best(0) > 1.3  # planted: 64 samples


def scaled(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
    """One Gaussian a sample, of another size each."""
    return x / (1 + (t.reshape(-1, 1) / scale) ** 2)


@pytest.mark.parametrize(("spread", "anew"), [(0.4, False), (0.6, True)])
def test_all_solvers_are_measured_anew_only_where_very_few_samples_hold_the_error(
    spread: float, anew: bool
) -> None:
    """That took 92,000 of 246,000 evaluations where twice the samples of the six best, 10,000, did."""
    sizes = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    conditions = {"scale": torch.exp(spread * sizes)}
    problem = SamplingProblem(Denoiser(scaled, EDM(), "data"), (8,), conditions)
    lines = list[str]()
    find_start(problem, 5, effort="full", again=1e6, say=lines.append)
    again = next(line for line in lines if "again" in line)
    assert again.endswith("up to 1024" if anew else "up to 128")
    after = lines[lines.index(again) + 1]
    every = f"of {len(handcrafted_candidates(EDM(), 5))} stay"
    assert after.endswith(every) == anew and ("6 of 6 stay" in after) != anew


def test_a_search_goes_on_only_while_the_time_pays_for_it() -> None:
    """Beside another process a network was a tenth as fast: the search took 18 minutes of 10."""
    problem = SamplingProblem(Denoiser(two_modes, EDM(), "data"), (1,))

    def samples(paid: Callable[[], float]) -> int:
        start, _ = find_start(problem, 6, effort="full", again=400_000, paid=paid)
        return start.ranking[0].samples

    assert samples(lambda: 6_000.0) == 64  # the plan's own
    assert samples(lambda: 20_000.0) == 128
    assert samples(lambda: 400_000.0) == 1024  # planted: all the time there is


def test_a_small_budget_measures_every_solver_and_goes_on_with_the_best() -> None:
    """The lean search left out what is the best of some models by a factor of three."""
    problem = SamplingProblem(Denoiser(two_modes, EDM(), "data"), (1,))
    assert Contest(EDM(), 5, "full", most=4_000).plan is SMALLER[-1]
    assert Contest(EDM(), 5, "full", most=2_000).plan in LEAN
    start, _ = find_start(problem, 5, effort="full", most=4_000)
    assert start.calls <= AGAIN * 4_000 + 4 * 96 * 16  # a refined proof
    assert len(start.ranking) == len(handcrafted_candidates(EDM(), 5))
    only, _ = find_start(problem, 5, effort="full", most=4_000, again=0)
    assert start.ranking[0].samples > only.ranking[0].samples == 8  # planted: no more than the plan


def test_a_search_whose_error_is_known_ends() -> None:
    """One Gaussian: no sample stands out, and nothing is measured again."""
    problem = SamplingProblem(
        Denoiser(lambda x, t: x / (1 + t.reshape(-1, 1) ** 2), EDM(), "data"), (8,)
    )
    lines = list[str]()
    find_start(problem, 4, effort="full", most=1e9, say=lines.append)
    assert not any("again" in line for line in lines)


def test_strata_weigh_as_many_samples_as_they_stand_for() -> None:
    tails = [torch.full((4,), each, dtype=torch.float64) for each in (4.0, 1.0)]
    rest = [torch.full((10,), each, dtype=torch.float64) for each in (0.4, 0.1)]
    found = stratified(tails, rest, 100, 14)
    assert abs(found.ratio - 2) < 1e-12 and abs(found.low - 2) + abs(found.high - 2) < 1e-12
    assert abs(found.rmse**2 - (4 * 1.0 + 96 * 0.1) / 100) < 1e-12
    assert (found.samples, found.solved) == (100, 14)


def test_picked_samples_are_the_problems_own() -> None:
    conditions = {"shift": torch.arange(3.0)[:, None]}
    problem = SamplingProblem(Denoiser(labelled, EDM(), "data"), (1,), conditions)
    tables = [c.table for c in handcrafted_candidates(problem.process, 2)[:3]]
    picked = Picked(problem, [7, 2, 12])
    found = run_tables(picked, tables, range(3))
    expected = run_tables(problem, tables, range(13))[:, [7, 2, 12]]
    assert torch.allclose(found, expected, atol=1e-5)
    before = problem.calls
    run_tables(picked, tables[:1], range(1, 3))
    assert problem.calls == before + 4
    other = run_tables(Picked(problem, [8, 3, 13]), tables, range(3))  # planted
    assert not torch.allclose(other, expected, atol=1e-3)


def test_the_held_out_samples_may_name_another_handcrafted_solver() -> None:
    """The search's last round, 64 samples, had the last word: on mixtures its best was often 1.7 times
    worse than another of that round.
    """
    problem = SamplingProblem(Denoiser(two_modes, EDM(), "data"), (1,))
    exact = ExactSolution(problem)
    exact.prove(0.01)
    every = {c.label: c for c in handcrafted_candidates(problem.process, 5)}
    good, bad = every["ipndm3/time_quadratic"], every["ddim/time_uniform"]
    numbers = range(64)
    target = exact.solve(numbers)

    def named(error: float, samples: int) -> str:
        measured = [
            MeasuredCandidate(bad, error, 0.0, samples),
            MeasuredCandidate(good, 0.1, 0.0, samples),
        ]
        return measured_on(problem, target, measured, numbers)[0].candidate.label

    assert named(0.09, 8) == good.label
    assert named(1e-6, 1 << 30) == bad.label  # planted: what was measured before counts as well


def test_what_a_budget_has_left_measures_handcrafted_solvers_where_one_is_the_result() -> None:
    """A sixth of the budget was left where the result was a handcrafted solver, named by 40 samples."""
    problem = SamplingProblem(Denoiser(two_modes, EDM(), "data"), (1,))
    exact = ExactSolution(problem)
    exact.prove(0.003)
    every = {c.label: c for c in handcrafted_candidates(problem.process, 5)}
    good, bad = every["ipndm3/time_quadratic"], every["ddim/time_uniform"]
    few = MeasuredCandidate(bad, 0.05, 0.01, 4), MeasuredCandidate(good, 0.06, 0.01, 4)
    before, pays = problem.calls, 64 * exact.table().nfe
    found = with_what_is_left(problem, exact, few, range(1000), pays)
    assert found[0].candidate is good
    assert 0.8 * pays < problem.calls - before <= pays
    again = measured_on(problem, exact.solve(range(40)), few, range(40))
    assert found[0].samples > again[0].samples == 44
    assert with_what_is_left(problem, exact, few, range(1000), 10.0) is few  # planted
