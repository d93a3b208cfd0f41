"""The general learner: the base at the start, better after it, never worse, at any budget."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import GaussianMixture
from marks import slow
from torch import Tensor, nn

from dlms_engine import Sampler, distill, load_solver
from dlms_engine.learners.auto import AutoSettings
from dlms_engine.learners.auto.budget import Budget, parse_budget
from dlms_engine.learners.auto.choose import HELD_OUT_FIRST, AutoStage, choose_stage, end_of, ratio
from dlms_engine.learners.auto.counts import Counts
from dlms_engine.learners.auto.gauss_newton import STEP, GaussNewton
from dlms_engine.learners.auto.report import report_lines, write_report
from dlms_engine.learners.auto.shares import (
    PILOT,
    sample_cost,
    search_again,
    search_limit,
    too_few_updates,
    training_share,
)
from dlms_engine.learners.auto.table import GeneralTable
from dlms_engine.learners.auto.targets import Targets
from dlms_engine.learners.start import (
    ExactSolution,
    SamplingProblem,
    cost,
    handcrafted_candidates,
    rmse,
    run_tables,
)
from dlms_engine.learners.start.rounds import AGAIN
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.dlms import step_coefficients
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow, VPDiscrete

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
PROCESSES = [EDM(), VP(), RectifiedFlow(), VPDiscrete(betas=BETAS)]
MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]], dtype=torch.float64)


class Mixture(nn.Module):
    """Three points in the plane; no module to tap, no gradient asked for."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.mixture = GaussianMixture(process, MEANS, 0.4)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mixture(x.double(), t.double()).to(x.dtype)


def problem(process: Process) -> SamplingProblem:
    return SamplingProblem(Denoiser(Mixture(process), process, "data"), (2,))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_zero_parameters_are_the_base_to_the_bit(process: Process) -> None:
    for candidate in handcrafted_candidates(process, 4)[::8]:
        form = GeneralTable(candidate)
        table, base = form.table(form.zero()), candidate.table
        assert table is not None
        assert torch.equal(table.a, base.a) and torch.equal(table.times, base.times)
        assert torch.equal(table.b[:, : base.depth], base.b), candidate.label
        assert not table.b[:, base.depth :].any()
        table.validate()
        # planted: any parameter changes it
        moved = form.zero()
        moved[-1] = 1e-3
        other = form.table(moved)
        assert other is not None and not torch.equal(other.initial_scale, base.initial_scale)


def test_times_out_of_order_make_no_table() -> None:
    form = GeneralTable(handcrafted_candidates(EDM(), 4)[0])
    moved = form.zero()
    moved[form.groups["grid"]][0] = 5.0
    assert form.table(moved) is None


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_every_parameter_moves_every_base(process: Process) -> None:
    """From alpha = 0, as flows and zero-terminal-SNR models begin, moving the first network time made
    iPNDM and DEIS store noise, whose step has no size there: weights were NaN, the fit took no step,
    and the result was the base.
    """
    kinds = {c.solver: c for c in handcrafted_candidates(process, 3, afs=False)}
    for candidate in kinds.values():
        form = GeneralTable(candidate)
        for i in range(form.size):
            ways = [form.zero(), form.zero()]
            ways[0][i], ways[1][i] = STEP, -STEP
            tables = [table for table in map(form.table, ways) if table is not None]
            assert tables, (candidate.label, i)
            assert all(bool(t.a.isfinite().all() and t.b.isfinite().all()) for t in tables)


def test_a_table_is_learned_from_a_flows_pure_noise() -> None:
    """Every distillation of a flow's pipeline whose best solver is iPNDM or DEIS ended with its base."""
    solver = distill(
        problem(RectifiedFlow()).denoiser, nfe=3, shape=(2,), budget="60k", progress=False, afs=False,
        base="ipndm2/time_uniform", corrector=False,
    )  # fmt: skip
    base, table = solver.report["stages"]
    assert table["rmse"] < 0.7 * base["rmse"]


def test_the_size_of_a_noise_step_from_pure_noise_is_not_finite() -> None:
    """Planted: what the test above would find if noise were stored there."""
    start, end = (torch.tensor([t], dtype=torch.float64) for t in (1.0, 0.5))
    for prediction, finite in (("noise", False), ("data", True)):
        _, unit = step_coefficients(RectifiedFlow(), prediction, start, end)
        assert bool(unit.isfinite().all()) == finite


def test_a_parameter_that_breaks_the_run_stays_and_the_others_are_fitted() -> None:
    """One network output that is not finite made the whole step NaN."""
    base = next(c for c in handcrafted_candidates(EDM(), 3) if c.label == "ipndm2/time_uniform")
    mixture = Mixture(EDM())
    known = base.table.times.float()

    def network(x: Tensor, t: Tensor) -> Tensor:
        off = (t[:, None] - known[1]).abs()
        moved = (off > 1e-6 * known[1]) & (off < 0.01 * known[1])  # another time near the second
        return torch.where(moved, torch.nan, mixture(x, t))

    p = SamplingProblem(Denoiser(network, EDM(), "data"), (2,))
    exact = ExactSolution(SamplingProblem(Denoiser(mixture, EDM(), "data"), (2,)))
    fit = GaussNewton(p, GeneralTable(base), Targets(exact), 64)
    normal = fit.linearise(fit.form.zero(), 64)
    still = torch.diag(normal.matrix) == 0
    assert bool(normal.matrix.isfinite().all()) and 0 < int(still.sum()) < fit.form.size
    before, after, moved = fit._iterate(fit.form.zero(), 64)
    assert after < before and not moved[still].any() and moved[~still].any()


def test_a_step_is_the_least_squares_step() -> None:
    """Against the normal equations of a Jacobian by central differences in float64."""
    p = problem(VP())
    form = GeneralTable(
        next(c for c in handcrafted_candidates(VP(), 3) if c.label == "ddim/time_quadratic")
    )
    exact = ExactSolution(p)
    fit = GaussNewton(p, form, Targets(exact))
    normal = fit.linearise(form.zero(), 16)
    base = form.table(form.zero())
    residual = (exact.solve(range(16)) - run_tables(p, [base], range(16))[0]).double().flatten()
    columns = []
    for i in range(form.size):
        ends = []
        for sign in (1, -1):
            moved = form.zero()
            moved[i] += sign * 1e-2
            table = form.table(moved)
            ends.append(run_tables(p, [table], range(16))[0].double().flatten())
        columns.append((ends[0] - ends[1]) / 2e-2)
    jacobian = torch.stack(columns)
    expected = jacobian @ jacobian.T
    scale = torch.diag(expected).sqrt().clamp_min(1e-6)
    # the first network time stands at t_max and moves one way only: its difference is one-sided
    scale[form.groups["times"].start] = float("inf")
    difference = (normal.matrix - expected) / scale[:, None] / scale
    assert float(difference.abs().max()) < 0.05
    gradient = (normal.gradient - jacobian @ residual) / scale / residual.norm()
    assert float(gradient.abs().max()) < 0.05
    assert float((normal.gradient / scale / residual.norm()).abs().max()) > 0.3  # planted


@pytest.mark.parametrize(
    "process",
    [slow(PROCESSES[1]), PROCESSES[2]],
    ids=lambda p: p.name,
)
def test_result_beats_the_best_handcrafted_on_fresh_samples(
    process: Process, tmp_path: Path
) -> None:
    p = problem(process)
    path = tmp_path / "solver.safetensors"
    solver = distill(
        p.denoiser, nfe=4, shape=(2,), output=path, progress=False, budget="60k",
        corrector=False, effort="lean",
    )  # fmt: skip
    report = solver.report
    assert report["chosen"] == "table" and report["ratio"] > 1.2
    base = next(c for c in handcrafted_candidates(process, 4) if c.label == report["base"])
    numbers = range(1 << 24, (1 << 24) + 256)
    exact = ExactSolution(p, most_steps=192)
    exact.prove(report["rmse"])
    ends = run_tables(p, [base.table, solver.policy, exact.table()], numbers)
    assert rmse(ends[1], ends[2]) < rmse(ends[0], ends[2]) / 1.1
    again = load_solver(path)
    assert again.report == report
    assert json.loads(path.with_suffix(".report.json").read_text())["rmse"] == report["rmse"]
    x = p.noise(numbers)
    y = Sampler(p.denoiser, again)(x)
    assert float((y - ends[1]).abs().max()) < 1e-3


@pytest.mark.slow
def test_corrector_is_part_of_solver_file_and_sampler(tmp_path: Path) -> None:
    p = problem(RectifiedFlow())
    path = tmp_path / "solver.safetensors"
    solver = distill(p.denoiser, nfe=3, shape=(2,), output=path, progress=False, budget="120k")
    assert solver.report["chosen"] == "corrector" and solver.report["ratio"] > 2
    assert path.stat().st_size <= 1 << 20
    numbers = range(HELD_OUT_FIRST, HELD_OUT_FIRST + 32)
    expected = end_of(p, solver.policy, numbers)
    for backend in ("auto", "eager"):
        y = Sampler(p.denoiser, load_solver(path), backend=backend)(p.noise(numbers))
        assert float((y - expected).abs().max()) < 1e-4
    # planted: without the corrector it is another sample
    y = Sampler(p.denoiser, solver.policy.rows)(p.noise(numbers))
    assert float((y - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "budget",
    [
        "1calls",
        slow("2k"),
        slow("10k"),
    ],
)
def test_any_budget_gives_an_answer_no_worse_than_the_base(budget: str) -> None:
    p = problem(RectifiedFlow())
    solver = distill(p.denoiser, nfe=3, shape=(2,), progress=False, budget=budget)
    assert solver.report["ratio"] >= 1 and solver.nfe == 3
    assert solver.report["stages"][0]["name"] == "base"


def test_interrupt_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlms_engine.learners.auto import Auto

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Auto, "corrector", stop)
    p = problem(RectifiedFlow())
    solver = distill(p.denoiser, nfe=3, shape=(2,), progress=False, budget="40k")
    assert [s["name"] for s in solver.report["stages"]] == ["base", "table"]


def _stage(name: str, squares: list[float], features: list[float] | None = None) -> AutoStage:
    stage = AutoStage(name, handcrafted_candidates(EDM(), 2)[0].table)
    stage.squares = torch.tensor(squares, dtype=torch.float64)
    if features:
        stage.features = torch.tensor(features, dtype=torch.float64)
    return stage


def test_the_simpler_is_kept_unless_the_better_wins_by_two_standard_errors() -> None:
    base = _stage("base", [1.0, 1.1, 0.9, 1.0] * 4)
    close = _stage("table", [0.9, 1.2, 0.9, 0.99] * 4)
    better = _stage("table", [0.5, 0.6, 0.4, 0.5] * 4)
    assert choose_stage([base, close]) is base and choose_stage([base, better]) is better
    value, low, high = ratio(base, better)
    assert low <= value <= high and 1.3 < value < 1.5
    sharp = _stage("corrector", [0.1, 0.2, 0.1, 0.1] * 4, [9.0, 9.1, 9.0, 8.9] * 4)
    better.features = torch.tensor([1.0, 1.1, 0.9, 1.0] * 4, dtype=torch.float64)
    assert choose_stage([better, sharp]) is better  # nearer in pixels, farther in features


def test_a_few_samples_in_another_mode_do_not_decide_alone() -> None:
    """One of 64 runs ends elsewhere with every solver: its square is most of the mean."""
    base = _stage("base", [1.0, 1.1, 0.9, 1.0] * 16 + [900.0])
    nearer = _stage("corrector", [0.1, 0.12, 0.09, 0.1] * 16 + [500.0])
    assert choose_stage([base, nearer]) is nearer
    tail = _stage("corrector", [0.1, 0.12, 0.09, 0.1] * 16 + [2000.0])
    assert choose_stage([base, tail]) is base  # typically nearer, but not in RMSE
    alike = _stage("corrector", [1.0, 1.1, 0.9, 1.0] * 16 + [500.0])
    assert choose_stage([base, alike]) is base  # luck with one sample


@pytest.mark.parametrize(
    ("text", "seconds", "calls"),
    [(10, 600, None), ("10m", 600, None), ("90s", 90, None), ("2h", 7200, None),
     ("50k", None, 50_000), ("1_000calls", None, 1000)],
)  # fmt: skip
def test_budget_is_read(text: str, seconds: float | None, calls: float | None) -> None:
    limit = parse_budget(text)
    assert limit.seconds == (seconds or float("inf")) and limit.calls == (calls or float("inf"))


@pytest.mark.parametrize("text", ["", "ten", "-1m", "0", "5 days"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        AutoSettings(budget=text)


def test_budget_in_calls_is_counted() -> None:
    p = problem(EDM())
    budget = Budget(parse_budget("100calls"), p)
    p.calls += 25
    assert budget.left() == 75 and budget.share() == 0.25 and budget.left_until(0.5) == 25


def test_the_first_calls_of_a_network_say_nothing_of_its_speed() -> None:
    """After a kept start six evaluations, the slow first ones, had set the speed: a budget of two
    minutes ended after eight seconds with nothing learned.
    """
    called = []

    def slow_at_first(x: Tensor, t: Tensor) -> Tensor:
        called.append(len(x))
        if len(called) == 1:
            time.sleep(0.3)
        return x

    p = SamplingProblem(Denoiser(slow_at_first, EDM(), "data"), (2,))
    budget = Budget(parse_budget("60s"), p)
    p.predict(p.noise(range(2)), torch.full((2,), 80.0, dtype=torch.float64), range(2))
    assert budget.left() < 60 / 0.3 * 2
    budget.measure_speed()
    assert budget.left() > 20_000 and sum(called) == 2 + 3 * 16
    counted = Budget(parse_budget("100calls"), p)
    counted.measure_speed()
    assert counted.left() == 100  # what a budget in evaluations gives does not depend on the time


def test_unknown_settings_are_refused() -> None:
    p = problem(EDM())
    with pytest.raises(ValueError, match="samples"):
        AutoSettings(samples=2)
    with pytest.raises(ValueError, match="known settings"):
        distill(p.denoiser, "auto", nfe=3, shape=(2,), colour="red")


def test_the_search_for_the_start_is_the_largest_that_the_budget_pays_for() -> None:
    """Up to 60,000 evaluations it was lean: of solvers that end in another mode for one start in
    fifty its eight samples say nothing, and on a mixture the result was twice worse than the best.
    Then it was lean or full, and lean leaves out what is the best of some models.
    """
    process, whole = EDM(), cost(EDM(), 4, "full")

    def taken(budget: str, **settings: Any) -> int:
        limit = search_limit(AutoSettings(nfe=4, budget=budget, **settings), lambda: 1e-3)
        return cost(process, 4, "full", limit)

    assert taken(f"{3 * whole}calls") == taken("1m") == taken("1k", effort="full") == whole
    lean = cost(process, 4, "lean")
    assert lean < taken("15k") < taken("25k") < whole
    assert all(taken(budget) <= 0.4 * calls for budget, calls in (("15k", 15e3), ("25k", 25e3)))
    assert taken("1k") == lean
    assert taken("20s") < whole  # 8 s, of a network that takes 1 ms: time is kept to as well


def test_training_leaves_enough_for_the_choice() -> None:
    """The choice had a tenth of the budget, which was 32 samples of 40,000 evaluations."""
    problem = SamplingProblem(Denoiser(lambda x, t: x, EDM(), "data"), (2,))
    budget = Budget(parse_budget("40k"), problem)
    assert training_share(budget, 256 * 120) == pytest.approx(0.75)
    assert training_share(budget, 6_000) == pytest.approx(0.85)
    assert training_share(budget, 100) == pytest.approx(0.9)


def test_too_few_updates_of_all_rows_are_not_planned() -> None:
    """The embedded model at 5 and 120,000 evaluations: 68 updates were worth nothing, and the table's fit
    and the last row's corrector with what they took are 4.34 instead of 4.20 times below the best
    handcrafted solver.
    """
    problem = SamplingProblem(Denoiser(lambda x, t: x, EDM(), "data"), (2,))
    budget = Budget(parse_budget("120k"), problem)
    problem.calls += 12_000
    assert too_few_updates(budget, 5, 0.15)  # 75 updates
    assert not too_few_updates(budget, 5, 0.04)  # 20: left out anyway
    assert not too_few_updates(budget, 5, 0.7)  # 350: planted, enough
    assert not too_few_updates(budget, 1, 0.15)  # one row has no earlier ones


@pytest.mark.parametrize(("budget", "planned"), [("60k", False), ("150k", True)])
def test_a_run_plans_with_or_without_them(
    budget: str, planned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) / (1 + t.reshape(-1, 1, 1, 1))

    distill(Denoiser(network, EDM(), "data"), nfe=2, shape=(1, 4, 4), budget=budget)
    assert ("correctors of all 2 rows" in capsys.readouterr().out) == planned


def test_a_fit_does_not_end_on_ever_fewer_samples() -> None:
    """As the budget ran out, 64 samples became 32, 16, 8 and 8, and the table fitted those."""
    p = problem(EDM())
    exact = ExactSolution(p)
    exact.prove()
    fit = GaussNewton(p, GeneralTable(handcrafted_candidates(p.process, 4)[0]), Targets(exact), 64)
    fit.history = [{"samples": 64.0}, {"samples": 32.0}]
    fit.counts, fit._used = Counts(4, 64, 64), 32
    fit.targets(64)
    for affordable, taken in ((16, 0), (32, 32), (64, 64)):  # planted: half of the last is 16
        budget = Budget(parse_budget(f"{affordable * fit.cost() + 1}calls"), p)
        assert fit._samples(6, 64, budget, 1.0) == taken
        fit._used = 32


@pytest.mark.parametrize("budget", [5_000, 8_000])
def test_a_small_budget_is_kept_with_the_smallest_choice(budget: int) -> None:
    """5k were exceeded by a fifth: the search took what the choice among so few samples needs."""
    solver = distill(
        problem(EDM()).denoiser, nfe=5, shape=(2,), budget=f"{budget}calls", progress=False
    )
    assert 0.5 * budget < solver.report["calls"] <= budget
    again = search_again(AutoSettings(nfe=5, budget="5k"), 2_000)
    assert again is not None and again + PILOT * sample_cost(5, 1) <= 5_000
    assert AGAIN * 2_000 + PILOT * sample_cost(5, 1) > 5_000  # planted: without it


def test_a_sharper_exact_solution_for_the_choice_keeps_to_the_budget() -> None:
    """The smallest errors ask for a finer solution: measuring all again took two fifths more."""
    p = problem(EDM())
    solver = distill(p.denoiser, nfe=6, shape=(2,), budget="120k", progress=False)
    assert solver.report is not None
    assert 100_000 < solver.report["calls"] < 1.03 * 120_000


def test_a_stage_that_is_not_finite_neither_ends_a_run_nor_is_drawn(tmp_path: Path) -> None:
    """The picture of the report raised, after the training and ahead of the solver's file."""
    pytest.importorskip("matplotlib")
    import matplotlib

    stages = [
        {"name": name, "rmse": rmse, "standard_error": None, "samples": 8, "calls": 1, "seconds": 0.0,
         "frechet": 1.0}
        for name, rmse in (("base", 0.5), ("table", None))
    ]  # fmt: skip
    report = {
        "nfe": 3, "base": "ddim/polynomial", "chosen": "base", "rmse": 0.5, "ratio": 1.0,
        "ratio_interval": [1.0, 1.0], "stages": stages,
        "ranking": [{"solver": "ddim/polynomial", "rmse": 0.5, "standard_error": None}],
        "exact": {"solver": "unipc", "grid": "polynomial", "steps": 48, "disagreement": 0.0,
                  "against": 0.5, "holds": True},
    }  # fmt: skip
    backend = matplotlib.get_backend()
    write_report(tmp_path / "x.safetensors", report)
    assert (tmp_path / "x.report.png").exists() and report_lines(report)
    assert matplotlib.get_backend() == backend
