"""The table's fit from more than one base: a few iterations of each, the rest of the better one."""

from __future__ import annotations

from collections.abc import Callable

from ..start import SamplingProblem, Start
from .budget import Budget
from .gauss_newton import GaussNewton
from .progress import RunCheckpoint
from .settings import AutoSettings
from .table import GeneralTable, bases
from .targets import Targets

TRIAL = 3
"""Iterations of each base before the better one goes on."""


class TableFits:
    """Fits of one run, one for each base; those of a resumed run stand where they stood.

    Args:
        share: of the budget, by whose use they end; it moves with the speed that is measured.

    Attributes:
        each: the fits.
    """

    def __init__(
        self,
        problem: SamplingProblem,
        settings: AutoSettings,
        start: Start,
        targets: Targets,
        budget: Budget,
        share: Callable[[], float],
        progress: RunCheckpoint,
        say: Callable[[str], None],
    ) -> None:
        self._targets, self._budget, self._share = targets, budget, share
        self._progress, self._say = progress, say
        self.each = [
            GaussNewton(
                problem,
                GeneralTable(base, settings.depth, settings.afs),
                targets,
                settings.samples,
                start.effective,
                budget.left_until(share()),
            )
            for base in bases(start, settings.base == "best")
        ]
        trial = self.each[0].cost() * TRIAL * self.each[0].counts.first
        if progress.reached("trial 1"):
            self._resume()
        elif len(self.each) > 1 and budget.left_until(share()) < 4 * trial:
            self.each = self.each[:1]  # too little to compare two on

    def _resume(self) -> None:
        standing = self._progress.standing
        self._say(f"resumed at {standing.phase!r}")
        self.each = self.each[: len(standing.fits)]
        self._targets(standing.targets)
        for number, state in enumerate(standing.fits):
            parameters = self._progress.tensors[f"fit{number}"].double()
            self.each[number].restore(parameters, state)

    def run(self) -> GaussNewton:
        """A few iterations of each, the rest of the better one, which is returned."""
        progress, better = self._progress, 0
        progress.align("trial 1")
        for number, fit in enumerate(self.each, 1):
            self._say(
                f"table: {fit.form.size} parameters from {fit.form.base.label}, {fit.cost()} "
                "evaluations a sample and iteration"
            )
            if len(self.each) > 1:
                self._try(number, fit)
        if progress.reached("fit"):
            better = progress.standing.better
        elif len(self.each) > 1:
            better = self._better()
        progress.align("fit")
        keep = self._keeper("fit", better)
        self.each[better].fit(self._budget, self._share(), say=self._say, after=keep)
        return self.each[better]

    def furthest(self) -> GaussNewton:
        """The fit of the most iterations, where ``run`` was interrupted."""
        return max(self.each, key=lambda fit: fit.done)

    def _try(self, number: int, fit: GaussNewton) -> None:
        phase, began = f"trial {number}", self._progress.standing.began
        self._progress.align(phase)
        until = began + max(0.0, self._share() - began) * number / 4
        fit.fit(self._budget, until, iterations=TRIAL, say=self._say, after=self._keeper(phase))

    def _keeper(self, phase: str, better: int = 0) -> Callable[[], None]:
        def keep() -> None:
            tensors = {f"fit{number}": fit.parameters for number, fit in enumerate(self.each)}
            states = [fit.state() for fit in self.each]
            count = self._targets.count
            self._progress.keep(phase, tensors, fits=states, targets=count, better=better)

        return keep

    def _better(self) -> int:
        """Number of the fit with the smaller error on the training samples there are."""
        tables = [fit.form.table(fit.parameters) for fit in self.each]
        first = self.each[0]
        count = min(first.counts.searched, max(1, self._targets.count))
        errors = first.errors([table for table in tables if table is not None], count)
        return min(range(len(self.each)), key=errors.__getitem__)
