"""The corrector's training takes time but no evaluations: a budget of minutes pays for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlms_engine.learners.auto import budget as budgets
from dlms_engine.learners.auto import correct
from dlms_engine.learners.auto.budget import Budget, parse_budget
from dlms_engine.learners.auto.correct import fit_corrector, train_corrector
from dlms_engine.learners.auto.runs import run_keeping
from dlms_engine.learners.auto.targets import Targets
from dlms_engine.learners.start import ExactSolution, SamplingProblem, handcrafted_candidates
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.corrector import Corrector
from dlms_engine.processes import EDM

EVALUATION, UPDATE = 0.001, 0.002
"""Seconds that one sample takes in the network, and in an update of the corrector."""


class Clock:
    """Time that passes where the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed:
    """A problem, its exact ends and a table, on a clock that evaluations and updates advance."""

    def __init__(self, patch: pytest.MonkeyPatch, update: float = UPDATE) -> None:
        self.clock = clock = Clock()
        patch.setattr(budgets, "time", clock)
        patch.setattr(correct, "time", clock)

        def network(x: Tensor, t: Tensor) -> Tensor:
            clock.now += EVALUATION * len(x)
            return 0.5 * torch.tanh(x)

        residual = Corrector.residual

        def timed(self: Corrector, inputs: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                clock.now += update * len(inputs)
            return residual(self, inputs)

        patch.setattr(Corrector, "residual", timed)
        self.problem = SamplingProblem(Denoiser(network, EDM(), "data"), (1, 4, 4))
        self.table = handcrafted_candidates(EDM(), 3)[0].table
        exact = ExactSolution(self.problem)
        exact.prove()
        self.targets = Targets(exact)

    def fitted(self, limit: str, share: float) -> tuple[Budget, float]:
        """The budget afterwards, and how many samples were trained on."""
        budget = Budget(parse_budget(limit), self.problem)
        numbers = range(4096)  # the search for the start
        t = torch.tensor(80.0, dtype=torch.float64)
        self.problem.predict(self.problem.noise(numbers), t, numbers)
        found = fit_corrector(self.problem, self.table, self.targets, budget, share)
        assert found is not None
        return budget, found[1]["samples"]


def test_a_budget_of_time_pays_for_samples_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 64x64 network's corrector trained for as long as its samples had taken, all of its share, and
    the rows' correctors, for which nothing was left, were never trained.
    """
    timed = Timed(monkeypatch)
    budget, samples = timed.fitted("60s", 0.6)
    assert 0.35 < budget.share() < 0.63 and samples > 100
    # planted: training that is taken to cost nothing, and ends when it is done
    monkeypatch.setattr(Budget, "worth", lambda self, seconds: 0.0)
    monkeypatch.setattr(correct, "LEAST_SHARE", 1e9)
    timed = Timed(monkeypatch)
    budget, more = timed.fitted("60s", 0.6)
    assert budget.share() > 0.9 and more > 1.5 * samples


def test_a_budget_of_evaluations_knows_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = set()
    for update in (UPDATE, 1e4 * UPDATE):
        with monkeypatch.context() as patch:
            counts.add(Timed(patch, update).fitted("30k", 0.6)[1])
    assert len(counts) == 1


def test_training_ends_with_its_time_at_a_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch)
    runs = run_keeping(timed.problem, timed.table, range(128))
    target = timed.targets(128)
    settings = correct.settings_for((1, 4, 4), timed.table.depth)
    assert settings is not None
    rates: list[float] = []
    step = correct.optimiser_step

    def watched(optimiser: torch.optim.Optimizer) -> None:
        rates.append(optimiser.param_groups[0]["lr"])
        step(optimiser)

    monkeypatch.setattr(correct, "optimiser_step", watched)
    corrector = correct.initial_corrector(settings, runs, target)
    numbers = train_corrector(corrector, runs, target, elapsed=lambda: len(rates) / 40)
    assert len(rates) == 40 and rates[0] == 3e-3 and rates[-1] < 1e-5
    assert numbers["after"] < numbers["before"]  # what time there was is not lost
    rates.clear()
    train_corrector(corrector, runs, target)  # planted: no limit
    assert len(rates) == 200
