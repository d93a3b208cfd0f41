"""How many samples the table is fitted to, where a few of them hold the error."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dlms_engine.learners.auto.budget import Budget, parse_budget
from dlms_engine.learners.auto.counts import SEARCHED, Counts, samples_for
from dlms_engine.learners.auto.gauss_newton import GaussNewton
from dlms_engine.learners.auto.table import GeneralTable
from dlms_engine.learners.auto.targets import Targets
from dlms_engine.learners.start import (
    ExactSolution,
    MeasuredCandidate,
    Proof,
    SamplingProblem,
    Start,
    handcrafted_candidates,
    rmse_with_error,
    run_tables,
)
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM


def test_the_effective_share_of_samples_is_kishs() -> None:
    candidate = handcrafted_candidates(EDM(), 3)[0]
    proof = Proof("unipc", "logsnr", 24, "ddim/logsnr", 0.0, 0.0, 1.0, 8, 0)

    def effective(squares: Tensor) -> float:
        value, error = rmse_with_error(squares)
        measured = MeasuredCandidate(candidate, value, error, len(squares))
        return Start(3, (measured,), proof, 0, 0.0).effective

    assert effective(torch.ones(64)) == 1
    one = torch.zeros(64)
    one[3] = 5.0
    assert effective(one) == pytest.approx(1 / 64, rel=0.03)
    drawn = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 6
    kish = float(drawn.sum() ** 2 / drawn.square().sum()) / 64
    assert 0.05 < kish < 0.3 and effective(drawn) == pytest.approx(kish, rel=0.03)
    unknown = MeasuredCandidate(candidate, float("nan"), float("nan"), 0)
    assert Start(3, (unknown,), proof, 0, 0.0).effective == 1


def test_more_samples_where_few_hold_the_error_and_the_budget_pays() -> None:
    numbers = 1024
    assert samples_for(40, numbers) == 64
    usual = Counts.of(40, numbers)
    assert (usual.most, usual.first, usual.searched) == (64, 16, SEARCHED)
    tenth = Counts.of(40, numbers, effective=0.1, pays=1e9)
    assert (tenth.most, tenth.first, tenth.searched) == (640, 160, 640)
    assert Counts.of(40, numbers, effective=0.1, pays=200.0).most == 200
    assert Counts.of(40, numbers, effective=0.1, pays=20.0) == usual  # what a small budget had
    assert Counts.of(40, numbers, most=100, effective=0.1, pays=1e9).most == 100  # the user's
    assert Counts.of(40, numbers, effective=1e-9, pays=1e9).most == 1024
    vectors = Counts.of(40, 2, effective=0.1, pays=1e9)
    assert vectors.most == 4096 and vectors.searched == 640
    assert Counts.of(40, 2, effective=0.1, pays=100.0).searched == 100
    assert Counts(**tenth.state()) == tenth


class Rare(torch.nn.Module):
    """Bends one start in sixteen far more than the others."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (x.flatten(1).mean(1) / (1 + t.to(x.dtype) ** 2).sqrt()).reshape(-1, 1, 1, 1)
        return torch.tanh(x) * (1 + 8 * torch.sigmoid(60 * (level - 0.4)))


def fit_on(most: int | None, effective: float = 1.0, left: float = 0.0) -> GaussNewton:
    problem = SamplingProblem(Denoiser(Rare(), EDM(), "data"), (1, 4, 4))
    exact = ExactSolution(problem)
    exact.prove()
    base = next(c for c in handcrafted_candidates(EDM(), 3) if c.label == "ipndm2/polynomial")
    return GaussNewton(problem, GeneralTable(base), Targets(exact), most, effective, left)


def test_what_fitted_a_few_samples_only_is_taken_back_when_there_are_more() -> None:
    fit = fit_on(64)
    lines: list[str] = []
    budget = Budget(parse_budget("1000k"), fit.problem)
    fit._used, fit.done = 16, 2
    good = fit.form.zero()
    bad = good.clone()
    bad[-3:] = 0.3  # as if sixteen samples had asked for it
    fit.parameters = bad
    fit._look_back(32, lines.append)
    assert torch.equal(fit.parameters, good) and "from there again" in lines[0]
    fit._look_back(64, lines.append)  # planted: what is best stays, without a word
    assert torch.equal(fit.parameters, good) and len(lines) == 1
    fit.fit(budget, 1.0, iterations=4)
    learned = fit.parameters
    fit._look_back(64, lines.append)
    assert torch.equal(fit.parameters, learned) and torch.equal(fit._earlier, learned)


def test_a_fit_on_enough_samples_holds_on_others() -> None:
    test = range(1 << 24, (1 << 24) + 1024)

    def ratio(fit: GaussNewton) -> tuple[float, float]:
        fit.fit(Budget(parse_budget("5000k"), fit.problem), 1.0)
        tables = [fit.form.table(place) for place in (fit.form.zero(), fit.parameters)]
        ends = run_tables(fit.problem, [t for t in tables if t is not None], test)
        errors = (ends - fit.targets._exact.solve(test)).square().mean((1, 2, 3, 4)).sqrt()
        return float(errors[1] / errors[0]), fit.history[-1]["rmse"] / float(errors[0])

    few, fitted = ratio(fit_on(16))
    many, _ = ratio(fit_on(None, 0.1, 5e6))
    assert fitted < 0.9 * few  # planted: few samples tell little of others
    assert many < 0.97 * few and many < 1


def test_a_resumed_fit_goes_on_with_its_counts() -> None:
    whole, part = fit_on(None, 0.2, 2e5), fit_on(None, 0.2, 2e5)
    assert 375 < whole.counts.most < 1850
    for fit, iterations in ((whole, 5), (part, 2)):
        fit.fit(Budget(parse_budget("900k"), fit.problem), 1.0, iterations=iterations)
    again = fit_on(None, 0.2, 3e4)  # less is left by now
    assert again.counts != whole.counts
    again.restore(part.parameters, part.state())
    assert dataclasses.asdict(again.counts) == dataclasses.asdict(whole.counts)
    again.fit(Budget(parse_budget("900k"), again.problem), 1.0, iterations=5)
    assert torch.equal(again.parameters, whole.parameters)
    old = {k: v for k, v in part.state().items() if k not in ("counts", "earlier")}
    again.restore(part.parameters, old)  # of a checkpoint from before there were counts
    again.fit(Budget(parse_budget("900k"), again.problem), 1.0, iterations=3)
    assert again.done == 3
