"""The best handcrafted solver of one model, by measuring all of them with fewer and fewer left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...processes import as_float64
from ...support.transfer import to_host
from .contest import Candidate, Contest
from .exact import EXACT_SHARE, ExactSolution, Proof
from .problem import SamplingProblem
from .rounds import HOLD, IMPRECISE, MOST_SAMPLES, SURE, Rounds
from .shared_runs import SharedRuns

Report = Callable[[str], None]


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate's endpoint RMSE to the exact solution, with its standard error."""

    candidate: Candidate
    rmse: float
    error: float
    samples: int

    @property
    def effective(self) -> float:
        """Share of the samples that hold the squared error: 1 where all have the same, 1 / n where one
        of n has all of it (Kish's effective sample size, of n); 1 where it is not known.
        """
        if not (self.rmse > 0 and math.isfinite(self.error)):
            return 1.0
        return 1 / (1 + self.samples * (2 * self.error / self.rmse) ** 2)


@dataclass(frozen=True)
class Start:
    """The best handcrafted solvers of a model at one number of evaluations.

    Attributes:
        ranking: measured candidates, best first; those of the last round lead.
        proof: of the exact solution they were measured against.
        calls: network evaluations of one sample that all this took.
        seconds: wall-clock time.
    """

    nfe: int
    ranking: tuple[MeasuredCandidate, ...]
    proof: Proof
    calls: int
    seconds: float

    @property
    def best(self) -> Candidate:
        return self.ranking[0].candidate

    @property
    def effective(self) -> float:
        """Of the best one, see ``MeasuredCandidate``."""
        return self.ranking[0].effective

    def with_base(self, base: Candidate) -> Start:
        """The same with ``base`` in front, whatever was measured."""
        rest = tuple(m for m in self.ranking if m.candidate.label != base.label)
        same = [m for m in self.ranking if m.candidate.label == base.label]
        first = same[0] if same else MeasuredCandidate(base, float("nan"), float("nan"), 0)
        return dataclasses.replace(self, ranking=(first, *rest))

    def lines(self, most: int = 10) -> list[str]:
        """The table as text, best first."""
        width = max(len(m.candidate.label) for m in self.ranking[:most])
        head = f"{'solver/grid':{width}}  {'RMSE':>9}  {'+-':>8}  samples"
        rows = [
            f"{m.candidate.label:{width}}  {m.rmse:9.5f}  "
            f"{f'{m.error:8.5f}' if math.isfinite(m.error) else '-':>8}  {m.samples:7d}"
            for m in self.ranking[:most]
        ]
        return [head, *rows]

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "nfe": self.nfe,
            "ranking": [
                {
                    "solver": m.candidate.label,
                    "rmse": m.rmse,
                    "standard_error": m.error,
                    "samples": m.samples,
                }
                for m in self.ranking
            ],
            "exact": {**self.proof.__dict__, "holds": self.proof.holds},
            "calls": self.calls,
            "seconds": self.seconds,
        }


class Search:
    """Successive halving (Jamieson & Talwalkar 2016) over handcrafted tables.

    Every round measures what is left on more samples, the same for all, and keeps the best.

    Args:
        paid: evaluations that the time left pays for; counted before each round beyond the plan, as a
            network may be slower than it was, beside other processes.
    """

    FIRST = 1 << 21
    """Number of the first sample, apart from those of proof, training and validation."""

    def __init__(
        self,
        problem: SamplingProblem,
        exact: ExactSolution,
        contest: Contest,
        say: Report,
        paid: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.problem, self.exact, self.contest, self.say = problem, exact, contest, say
        self.paid = paid
        self._begin()

    def run(self) -> list[MeasuredCandidate]:
        """Measured candidates, best first."""
        ranked = self._rounds(self.contest.plan)
        until = self.problem.calls + self.contest.more
        while True:
            best, left = ranked[0], min(until - self.problem.calls, self.paid())
            solving = self.exact.table().nfe
            imprecise = best.error > IMPRECISE * best.rmse
            few = imprecise and best.effective < HOLD
            wider = self.contest.wider(best.samples, left, solving) if few else None
            if wider is not None:
                self._say_imprecise(best, wider.samples[-1])
                self._begin()
                return self._rounds(wider)
            twice = best.samples * (len(self._left) * self.contest.nfe + solving)
            if twice > (left if imprecise else SURE * left) or best.samples >= MOST_SAMPLES:
                return ranked
            if imprecise:
                self._say_imprecise(best, 2 * best.samples)
            ranked = self._round(best.samples, 2 * best.samples, len(self._left))

    def _say_imprecise(self, best: MeasuredCandidate, samples: int) -> None:
        self.say(
            f"{best.samples} samples: RMSE {best.rmse:.4g} +- {best.error:.2g}, a few of them hold the "
            f"error: again on up to {samples}"
        )

    def _begin(self) -> None:
        self._left = self.contest.candidates
        self._squares: dict[str, list[float]] = {c.label: [] for c in self._left}
        self._done: list[MeasuredCandidate] = []

    def _rounds(self, plan: Rounds) -> list[MeasuredCandidate]:
        before, ranked = 0, list[MeasuredCandidate]()
        for samples, keep in zip(plan.samples, plan.keep, strict=True):
            ranked = self._round(before, samples, keep)
            before = samples
        return ranked

    def _round(self, before: int, samples: int, keep: int) -> list[MeasuredCandidate]:
        """What is left, measured on ``samples`` in all, ``before`` known; ``keep`` of them stay."""
        self._measure(range(self.FIRST + before, self.FIRST + samples))
        ranked = self._ranked()
        if not before:
            self._sharpen(ranked[0].rmse, samples)
            ranked = self._ranked()
        self._done = [*ranked[keep:], *self._done]
        self._left = [m.candidate for m in ranked[:keep]]
        self.say(
            f"{samples} samples: best {ranked[0].candidate.label}, RMSE {ranked[0].rmse:.4g}; "
            f"{len(self._left)} of {len(ranked)} stay"
        )
        return [*ranked[:keep], *self._done]

    def _ranked(self) -> list[MeasuredCandidate]:
        return sorted(map(self._measured, self._left), key=lambda m: m.rmse)

    def _sharpen(self, smallest: float, samples: int) -> None:
        """More steps for the exact solution, if the best candidate comes near its uncertainty."""
        assert self.exact.proof is not None
        steps = self.exact.proof.steps
        proof = self.exact.prove(smallest, share=EXACT_SHARE / 2)
        if proof.steps == steps:
            return
        for values in self._squares.values():
            values.clear()
        self._measure(range(self.FIRST, self.FIRST + samples))

    def _measure(self, numbers: range) -> None:
        runs = SharedRuns([c.table for c in self._left] + [self.exact.table()])
        step = runs.chunk(self.problem.shape)
        for low in range(numbers.start, numbers.stop, step):
            part = range(low, min(low + step, numbers.stop))
            for _, ends in runs.ends(self.problem.predict, self.problem.noise(part), part.start):
                squares = to_host((ends[:-1] - ends[-1]).double().square().flatten(2).mean(2))
                for candidate, row in zip(self._left, squares.tolist(), strict=True):
                    self._squares[candidate.label].extend(row)

    def _measured(self, candidate: Candidate) -> MeasuredCandidate:
        squares = torch.tensor(self._squares[candidate.label], dtype=torch.float64, device="cpu")
        squares = squares.nan_to_num(nan=float("inf"))
        value, error = rmse_with_error(squares)
        return MeasuredCandidate(candidate, value, error, len(squares))


def rmse_with_error(squares: Sequence[float] | Tensor) -> tuple[float, float]:
    """Root of the mean and its standard error, from mean squares of every sample."""
    values = as_float64(squares)
    value = math.sqrt(float(values.mean()))
    if len(values) < 2 or not math.isfinite(value) or value == 0:
        return value, float("inf") if len(values) < 2 else 0.0
    return value, float(values.std()) / math.sqrt(len(values)) / (2 * value)
