"""Correctors of every row: they start as nothing, learn through the network, and are left out plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dlms_engine import Sampler
from dlms_engine.learners.auto.budget import Budget, parse_budget
from dlms_engine.learners.auto.correct import initial_corrector, settings_for
from dlms_engine.learners.auto.every_row import (
    EveryRow,
    fit_every_row,
    gives_gradients,
    widths_for,
)
from dlms_engine.learners.auto.runs import corrected_ends, run_keeping
from dlms_engine.learners.start import ExactSolution, SamplingProblem
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.corrector import Corrector
from dlms_engine.processes import EDM, RectifiedFlow, grids
from dlms_engine.solvers import ddim
from dlms_engine.solvers.table import SolverTable


class Curved(nn.Module):
    """A velocity that bends with the state."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *([1] * (x.ndim - 1)))
        return x - torch.tanh(3 * x) * (1 + t)


def problem(shape: tuple[int, ...] = (2,)) -> SamplingProblem:
    process = RectifiedFlow(t_min=0.01)
    return SamplingProblem(Denoiser(Curved(), process, "flow"), shape)


def table(nfe: int = 3) -> SolverTable:
    process = RectifiedFlow(t_min=0.01)
    return ddim(process, grids.time_uniform(process, nfe))


def start(p: SamplingProblem, rows: SolverTable, count: int = 256) -> tuple[Corrector, Tensor]:
    exact = ExactSolution(p)
    exact.prove(0.05)
    target = exact.solve(range(count))
    settings = settings_for(p.shape, rows.depth)
    assert settings is not None
    return initial_corrector(settings, run_keeping(p, rows, range(count)), target), target


def run_of(p: SamplingProblem, rows: SolverTable, last: Corrector, target: Tensor) -> EveryRow:
    settings = widths_for(p.shape, rows.nfe, rows.depth, last.settings)
    assert settings is not None
    return EveryRow(p, rows, last, settings, target)


def test_untrained_it_is_the_table() -> None:
    p, rows = problem(), table()
    last, target = start(p, rows)
    policy = run_of(p, rows, last, target).result()
    numbers = range(1000, 1016)
    plain = run_keeping(p, rows, numbers).end
    assert torch.equal(corrected_ends(p, policy, numbers), plain)
    with torch.no_grad():  # planted: what follows the first row moves the end
        policy.parts[0].layers[-1].bias.fill_(1.0)
    assert not torch.equal(corrected_ends(p, policy, numbers), plain)


def test_gradient_goes_through_the_network() -> None:
    """Of the first row's corrector, against a difference quotient."""
    p, rows = problem(), table()
    last, target = start(p, rows, 64)
    run = run_of(p, rows, last, target)
    bias = run.parts[0].layers[-1].bias
    (gradient,) = torch.autograd.grad(run._squares(range(32)), bias)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * 1e-2
            ends.append(float(run._squares(range(32))))
            bias[0] -= sign * 1e-2
    quotient = (ends[0] - ends[1]) / 2e-2
    assert quotient != 0 and abs(float(gradient[0]) - quotient) < 0.05 * abs(quotient)


def test_training_helps_on_other_samples_and_the_sampler_runs_it() -> None:
    p, rows = problem(), table()
    last, target = start(p, rows)
    budget = Budget(parse_budget("80k"), p)
    found = fit_every_row(p, rows, last, target, budget, 1.0)
    assert found is not None
    policy, numbers = found
    assert numbers["after"] < numbers["before"] / 1.5
    fresh = range(1 << 24, (1 << 24) + 128)
    exact = ExactSolution(p)
    exact.prove(0.01)
    wanted, ends = exact.solve(fresh), corrected_ends(p, policy, fresh)
    before = (run_keeping(p, rows, fresh).end - wanted).square().mean()
    assert float((ends - wanted).square().mean()) < float(before) / 2
    assert float((Sampler(p.denoiser, policy)(p.noise(fresh)) - ends).abs().max()) < 1e-4
    again = Budget(parse_budget("80k"), p)  # a budget in evaluations repeats to the bit
    policy_again, _ = fit_every_row(p, rows, last, target, again, 1.0) or pytest.fail("left out")
    assert torch.equal(corrected_ends(p, policy_again, fresh), ends)


def test_without_gradients_it_is_left_out_with_a_word() -> None:
    class Closed(Curved):
        @torch.no_grad()
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t)

    process = EDM()
    closed = SamplingProblem(Denoiser(Closed(), process, "data"), (2,))
    assert not gives_gradients(closed) and gives_gradients(problem())
    p, rows, said = problem(), table(), list[str]()
    last, target = start(p, rows, 64)
    closed = SamplingProblem(Denoiser(Closed(), RectifiedFlow(t_min=0.01), "flow"), (2,))
    budget = Budget(parse_budget("100k"), closed)
    assert fit_every_row(closed, rows, last, target, budget, 1.0, say=said.append) is None
    assert "no gradients" in said[0]


def test_they_fit_in_a_solver_file() -> None:
    own = settings_for((3, 32, 32), 4)
    assert own is not None
    every = widths_for((3, 32, 32), 10, 4, own)
    assert every is not None and len(every) == 10 and every[-1] == own
    total = sum(sum(p.numel() for p in Corrector(each).parameters()) for each in every)
    assert 8 * total < 1 << 20
