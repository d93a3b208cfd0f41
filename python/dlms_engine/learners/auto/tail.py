"""How much nearer a result ends than its base, where a few samples hold most of the error.

On data of several modes a few samples of a hundred end in another mode, with the base or with the
result, and hold most of the squared error. Among the held-out samples there may be none, and no
interval from those knows of them. These samples start near the border of two modes, where solvers of
a few evaluations end far apart, and running some of these takes a fraction of an exact solution. So
they run on several times as many new samples, those where they differ most are solved exactly, and
the held-out ones stand for the rest
(sampling in two phases with strata; Cochran 1977, chapter 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...policies.corrector import CorrectedPolicy
from ...solvers.table import SolverTable
from ...support.transfer import to_host
from ..start import ExactSolution, SamplingProblem, run_tables
from .choose import AutoStage, end_of
from .runs import RUN_BATCH, batches
from .shares import SOLVED

RESAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """Of a stage with the base.

    Attributes:
        ratio: how many times smaller the stage's RMSE is; ``low`` and ``high`` its 95 % interval.
        rmse: of the stage.
        samples: what both were run on; ``solved``: of these, how many exactly.
    """

    ratio: float
    low: float
    high: float
    rmse: float
    samples: int
    solved: int


class Picked(SamplingProblem):
    """The samples ``numbers`` of ``problem`` under the numbers 0, 1, ..."""

    def __init__(self, problem: SamplingProblem, numbers: Sequence[int]) -> None:
        self.denoiser, self.process = problem.denoiser, problem.process
        self.shape, self.device = problem.shape, problem.device
        self.problem, self.numbers = problem, list(numbers)

    def noise(self, numbers: range) -> Tensor:
        """As of the problem, of the picked samples."""
        parts = self.numbers[numbers.start : numbers.stop]
        return torch.cat([self.problem.noise(range(each, each + 1)) for each in parts])

    def predict(
        self, x: Tensor, t: Tensor, numbers: range, prediction: Literal["data", "noise"] = "data"
    ) -> Tensor:
        """As of the problem, of the picked samples."""
        own = self.numbers[numbers.start : numbers.stop]
        copies = len(x) // len(own)
        if not hasattr(self.denoiser, "first_sample"):
            self.problem.calls += len(x)
            rows = self.problem.condition(own, copies)
            return self.denoiser.predict(x, t, prediction, **rows)
        times = t.expand(len(x))
        parts = [
            self.problem.predict(x[i : i + 1], times[i : i + 1], range(each, each + 1), prediction)
            for i, each in enumerate(own * copies)
        ]
        return torch.cat(parts)


@torch.no_grad()
def compare_with_base(
    problem: SamplingProblem,
    exact: ExactSolution,
    stages: tuple[AutoStage, AutoStage],
    others: Sequence[SolverTable],
    held: range,
    new: range,
) -> Comparison:
    """A base and a stage, measured on the samples ``held``, on the samples ``new`` as well.

    Args:
        others: solvers of as many evaluations, to show where base and stage may err alike.
    """
    policies = [*(stage.policy for stage in stages), *others]
    apart = _apart(problem, policies, new)
    far = apart.topk(max(1, len(new) // SOLVED))
    beyond = _apart(problem, policies, held) > float(far.values.min())
    picked = Picked(problem, [new.start + i for i in far.indices.tolist()])
    every = range(len(picked.numbers))
    target = run_tables(picked, [exact.table()], every)[0]
    tails = [
        torch.cat([_squares(end_of(picked, each.policy, every), target), each.squares[beyond]])
        for each in stages
    ]
    rest = [each.squares[~beyond] for each in stages]
    return stratified(tails, rest, len(new) + len(held), len(every) + len(held))


def stratified(
    tails: Sequence[Tensor], rest: Sequence[Tensor], total: int, solved: int
) -> Comparison:
    """Squared errors of base and stage: ``tails`` of all far samples of ``total``, ``rest`` of some of
    the others.
    """
    if len(rest[0]) == 0:
        rest = tails
    tail, others = torch.stack(list(tails)), torch.stack(list(rest))
    share = tail.shape[1] / total
    generator = torch.Generator().manual_seed(0)

    def drawn(values: Tensor) -> Tensor:
        rows = torch.randint(
            values.shape[1], (RESAMPLES, values.shape[1]), generator=generator, device="cpu"
        )
        return values[:, rows].mean(2)

    counts = torch.full((RESAMPLES,), float(total), dtype=torch.float64, device="cpu")
    shares = torch.binomial(counts, torch.full_like(counts, share), generator=generator) / total
    means = shares * drawn(tail) + (1 - shares) * drawn(others)
    low, high = torch.quantile(
        _ratio(means), torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    ).tolist()
    mean = share * tail.mean(1) + (1 - share) * others.mean(1)
    return Comparison(float(_ratio(mean)), low, high, float(mean[1].sqrt()), total, solved)


def _ratio(means: Tensor) -> Tensor:
    return (means[0] / means[1].clamp_min(1e-300)).sqrt()


def _squares(one: Tensor, two: Tensor) -> Tensor:
    return to_host((one - two).double().square().flatten(1).mean(1))


def _apart(
    problem: SamplingProblem, policies: Sequence[SolverTable | CorrectedPolicy], numbers: range
) -> Tensor:
    """``[B]``: the largest mean square between an end of the first policy and one of another."""
    parts = []
    for part in batches(numbers, RUN_BATCH):
        first, *more = (end_of(problem, policy, part) for policy in policies)
        parts.append(torch.stack([_squares(end, first) for end in more]).amax(0))
    return torch.cat(parts).nan_to_num(nan=float("inf"))
