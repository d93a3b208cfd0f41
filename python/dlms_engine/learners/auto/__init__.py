"""``distill(method="auto")``: the best handcrafted solver of this model, then what improves on it.

The start is measured, a general table is fitted by Gauss-Newton steps, a corrector is trained on its
runs, then one after every row; on samples none of them has seen, the simplest that is not beaten is
kept. So on those samples the result is never worse than the best handcrafted solver that was found,
whatever the model and however short the run.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...models.denoiser import Denoiser
from ...policies.corrector import CorrectedPolicy, Corrector, read_corrector
from ...policies.distilled import DistilledSolver
from ...solvers.table import SolverTable
from ...support.files import written
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
from ..start import ExactSolution, SamplingProblem, Start, find_start, seconds_of_one
from ..start.contest import candidate_of
from .budget import SPEED_BATCH, Budget, parse_budget
from .choose import AutoStage
from .correct import LEAST_SAMPLES, fit_corrector
from .every_row import fit_every_row
from .progress import RunCheckpoint
from .report import report_lines, report_of, write_report
from .settings import AutoSettings
from .shares import (
    CORRECTOR_SHARE,
    KEPT_SHARE,
    ROWS_SHARE,
    STAGES,
    TABLE_SHARE,
    WITHOUT_ROWS,
    effort_of,
    sample_cost,
    search_again,
    search_limit,
    search_time,
    too_few_updates,
    training_share,
)
from .table_fits import TableFits
from .targets import Targets
from .verdict import Judge

__all__ = ["AUTO", "Auto", "AutoSettings", "effort_of", "search_again", "search_limit"]


class Auto:
    """One run; ``stages`` holds the results so far, best last."""

    def __init__(
        self, problem: SamplingProblem, settings: AutoSettings, options: RunOptions
    ) -> None:
        self.problem, self.settings, self.options = problem, settings, options
        self.budget = Budget(parse_budget(settings.budget), problem)
        self.stages: list[AutoStage] = []
        self.history: list[dict[str, Any]] = []
        self._shares = TABLE_SHARE, CORRECTOR_SHARE
        fingerprint = {
            "method": "auto", **plain(settings), "seed": options.seed,
            "shape": list(problem.shape), **options.identity,
        }  # fmt: skip
        self.progress = RunCheckpoint(
            options.checkpoint, fingerprint, self.budget, resume=options.resume
        )

    def say(self, line: str) -> None:
        if self.options.progress:
            print(line, flush=True)

    def run(self) -> DistilledSolver:
        """All stages that the budget allows, and the choice among them."""
        start, exact = self.start()
        rows = self.rows_share - self._until(CORRECTOR_SHARE)
        if too_few_updates(self.budget, self.settings.nfe, rows):
            self._shares = WITHOUT_ROWS, ROWS_SHARE
        targets = Targets(exact)
        try:
            table = self.table(start, targets)
            self.corrector(table, targets)
        except KeyboardInterrupt:
            self.interrupted()
        return self.chosen(start, exact)

    def interrupted(self) -> None:
        """Nothing new is begun."""
        self.budget.interrupted = True
        self.say("interrupted: choosing among the results so far (interrupt again to give up)")

    def start(self) -> tuple[Start, ExactSolution]:
        most = search_limit(self.settings, lambda: seconds_of_one(self.problem, SPEED_BATCH))
        again = search_again(self.settings, most)
        output = self.options.output
        store = None if output is None else output.with_suffix(".start.json")
        before = self.problem.calls
        start, exact = find_start(
            self.problem, self.settings.nfe, effort=effort_of(self.settings), store=store,
            say=self.say, afs=self.settings.afs, most=most, again=again,
            paid=lambda: search_time(self.budget), resumed=self.progress.found is not None,
        )  # fmt: skip
        if self.problem.calls - before < start.calls:  # it was kept
            self.budget.count(start.calls, KEPT_SHARE)
            self.budget.measure_speed()
        if self.settings.base != "best":
            start = start.with_base(
                candidate_of(
                    self.problem.process, start.nfe, self.settings.base, afs=self.settings.afs
                )
            )
        self.exact = exact
        # Learned errors are smaller than those of the start, and measured by the same solution; where it
        # would take what the training needs, the choice asks for it again.
        exact.prove(start.ranking[0].rmse / 3, most=self.budget.left() / (2 * LEAST_SAMPLES))
        self.progress.align("start")
        self._stage("base", start.best.table)
        if self.progress.found is None:
            self.progress.standing.began = self.budget.share()
            self.progress.keep("start", {})
        return start, exact

    def table(self, start: Start, targets: Targets) -> SolverTable:
        fits = TableFits(
            self.problem, self.settings, start, targets, self.budget, lambda: self.table_share,
            self.progress, self.say,
        )  # fmt: skip
        try:
            fit = fits.run()
        except KeyboardInterrupt:
            self.interrupted()
            fit = fits.furthest()
        table = fit.form.table(fit.parameters)
        assert table is not None
        self.history += fit.history
        if fit.history:
            self._stage("table", table)
        return table

    @property
    def table_share(self) -> float:
        """Of the budget, by the end of the table's fit: the correctors' too where there are none."""
        return self._until(self._shares[0]) if self.settings.corrector else self.rows_share

    def _until(self, share: float) -> float:
        """``share`` of what the search for the start left, in shares of the whole budget."""
        began = min(1.0, self.progress.standing.began)
        return min(began + (1 - began) * share, self.rows_share)

    @property
    def rows_share(self) -> float:
        """Of the budget, by the end of all training."""
        each = sample_cost(self.settings.nfe, len(STAGES), self.exact.table().nfe)
        return training_share(self.budget, each * self.settings.held_out)

    def corrector(self, table: SolverTable, targets: Targets) -> None:
        if not self.settings.corrector:
            return
        found = self._one_corrector(table, targets)
        if found is None:
            return
        corrector, numbers = found
        self.history.append(numbers)
        self._stage("corrector", CorrectedPolicy(table, corrector))
        target = targets(int(numbers["samples"]))
        self.progress.align("corrector")
        every = fit_every_row(
            self.problem, table, corrector, target, self.budget, self.rows_share,
            say=self.say, interrupted=self.interrupted,
        )  # fmt: skip
        if every is not None:
            policy, numbers = every
            self.history.append(numbers)
            self._stage("correctors", policy)

    def _one_corrector(
        self, table: SolverTable, targets: Targets
    ) -> tuple[Corrector, dict[str, float]] | None:
        """The last row's, trained or read back."""
        if self.progress.reached("corrector"):
            state = self.progress.standing.corrector
            tensors = {
                name.removeprefix("corrector."): value
                for name, value in self.progress.tensors.items()
                if name.startswith("corrector.")
            }
            self.progress.align("corrector")
            corrector = read_corrector(tensors, state["settings"]).to(self.problem.device)
            return corrector, state["numbers"]
        found = fit_corrector(
            self.problem, table, targets, self.budget, self._until(self._shares[1]),
            features=self.settings.feature_phase, most=self.settings.samples, say=self.say,
        )  # fmt: skip
        if found is not None and not self.budget.interrupted:
            corrector, numbers = found
            self.progress.keep(
                "corrector",
                {f"corrector.{key}": value for key, value in corrector.state_dict().items()},
                corrector={"settings": asdict(corrector.settings), "numbers": numbers},
                targets=targets.count,
            )
        return found

    def _stage(self, name: str, policy: SolverTable | CorrectedPolicy) -> None:
        spent = self.progress.standing.stages
        if name not in spent:
            calls = sum(stage.calls for stage in self.stages)
            seconds = sum(stage.seconds for stage in self.stages)
            spent[name] = [self.budget.calls - calls, self.budget.seconds - seconds]
        self.stages.append(AutoStage(name, policy, int(spent[name][0]), spent[name][1]))

    def chosen(self, start: Start, exact: ExactSolution) -> DistilledSolver:
        start, best, compared = Judge(
            self.problem, start, exact, self.stages, self.settings, self.budget, self.say
        ).verdict()
        report = report_of(start, exact, self.stages, best, compared, self.budget)
        for line in report_lines(report):
            self.say(line)
        if self.options.output is not None:
            output = self.options.output
            written(lambda: write_report(output, report), "no report")
        described = {
            "method": "auto",
            **plain(self.settings),
            "seed": self.options.seed,
            "shape": list(self.problem.shape),
        }
        score = {"score": report["rmse"], "set": best.name, "report": report}
        return DistilledSolver(best.policy, "auto", described, self.history, score)


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Nothing to set; ``options.trajectories`` limits the samples that are trained on."""
    (own,) = split_settings(options.settings, AutoSettings)
    if options.trajectories is not None:
        own["samples"] = options.trajectories
    settings = AutoSettings(nfe=options.nfe, **own)
    problem = SamplingProblem(denoiser, shape, options.conditions or None, seed=options.seed)
    return Auto(problem, settings, options).run()


AUTO = LearnerEntry("auto", _run, AutoSettings, trajectories="samples", afs=True)
