"""Measures the stages of a run on samples none of them has seen, and chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...policies.corrector import CorrectedPolicy
from ...solvers.table import SolverTable
from ...support.transfer import to_host
from ...support.values import require_finite
from ..start import MeasuredCandidate, SamplingProblem, rmse_with_error, run_tables
from ..start.nearer import nearer, rmse_of, wins
from .features import features_of, projected_frechet
from .runs import RUN_BATCH, batches, corrected_ends

HELD_OUT_FIRST = 1 << 22
"""Number of the first held-out sample, apart from those of proof, start and training."""


@dataclass
class AutoStage:
    """One candidate result: the base, the table, the table with one corrector or one a row.

    Attributes:
        squares: float64 ``[B]``, mean squared error of every held-out sample.
        features: float64 ``[B]``, squared feature distance; empty without a tap.
        frechet: Frechet distance of the features, of the samples themselves without a tap; infinite
            before it is measured.
        calls, seconds: what making it took.
    """

    name: str
    policy: SolverTable | CorrectedPolicy
    calls: int = 0
    seconds: float = 0.0
    squares: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu")
    )
    features: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu")
    )
    frechet: float = math.inf

    def record(self) -> dict[str, Any]:
        """JSON values."""
        value, error = rmse_with_error(self.squares)
        found: dict[str, Any] = {
            "name": self.name,
            "rmse": value,
            "standard_error": error,
            "samples": len(self.squares),
            "calls": self.calls,
            "seconds": self.seconds,
            "frechet": self.frechet,
        }
        if len(self.features):
            found["feature_distance"] = float(self.features.mean())
            found["feature_error"] = float(self.features.std()) / math.sqrt(len(self.features))
        return found


@torch.no_grad()
def measure_stages(
    problem: SamplingProblem, target: Tensor, stages: Sequence[AutoStage], numbers: range
) -> None:
    """Fills what ``stages`` are chosen by; ``target``: exact ends ``[B, ...]`` of ``numbers``."""
    wanted = features_of(problem, target, numbers)
    for stage in stages:
        end = end_of(problem, stage.policy, numbers)
        stage.squares = to_host((end - target).double().square().flatten(1).mean(1))
        if stage is stages[0]:
            require_finite(rmse_of(stage.squares), f"the error of the {stage.name} on new samples")
        if wanted is None:
            stage.frechet = projected_frechet(end, target)
            continue
        seen = features_of(problem, end, numbers)
        assert seen is not None
        stage.features = to_host((seen - wanted).double().square().sum(1))
        stage.frechet = projected_frechet(seen, wanted)


@torch.no_grad()
def measured_on(
    problem: SamplingProblem, target: Tensor, finalists: Sequence[MeasuredCandidate], numbers: range
) -> tuple[MeasuredCandidate, ...]:
    """Measured solvers, best first, on their samples and ``numbers`` together, whose exact ends are
    ``target``; of these alone the standard error.
    """
    tables = [m.candidate.table for m in finalists]
    parts = []
    for part in batches(numbers, RUN_BATCH):
        low = part.start - numbers.start
        wanted = target[low : low + len(part)]
        squares = (run_tables(problem, tables, part) - wanted).double().square()
        parts.append(to_host(squares.flatten(2).mean(2)))
    found = []
    for known, squares in zip(finalists, torch.cat(parts, 1).nan_to_num(nan=math.inf), strict=True):
        samples = known.samples + len(numbers)
        mean = (known.samples * known.rmse**2 + float(squares.sum())) / samples
        error = rmse_with_error(squares)[1]
        found.append(MeasuredCandidate(known.candidate, math.sqrt(mean), error, samples))
    return tuple(sorted(found, key=lambda m: m.rmse))


def end_of(
    problem: SamplingProblem, policy: SolverTable | CorrectedPolicy, numbers: range
) -> Tensor:
    """End states ``[B, ...]`` of a stage."""
    if isinstance(policy, SolverTable):
        return run_tables(problem, [policy], numbers)[0]
    return corrected_ends(problem, policy, numbers)


def choose_stage(stages: Sequence[AutoStage], uncertainty: float = 0.0) -> AutoStage:
    """The simplest stage that no later one beats by two standard errors.

    A later stage, which is less simple, must also not be worse in feature distance by two standard
    errors, nor have a Frechet distance above that of the first. Differences are taken sample by
    sample. Where a few samples, which end in another mode of the data, hold most of the squared error,
    their mean says little: there the logarithms decide, if the RMSE is a tenth smaller too.

    Args:
        uncertainty: RMSE by which the exact solution is known, see ``beyond_doubt``.
    """
    chosen = stages[0]
    for stage in stages[1:]:
        if (
            nearer(stage.squares, chosen.squares)
            and not wins(stage.features - chosen.features)
            and beyond_doubt(rmse_of(chosen.squares), rmse_of(stage.squares), uncertainty)
            and stage.frechet <= stages[0].frechet
        ):
            chosen = stage
    return chosen


def beyond_doubt(rmse: float, smaller: float, uncertainty: float) -> bool:
    """Whether ``smaller`` is smaller by more than an exact solution known to ``uncertainty`` explains.

    Both errors hold it (a stage may have learned it, the one before may owe its error to it), and
    what is orthogonal adds in squares: a gain in squares below twice its own counts for nothing.
    """
    return rmse**2 - smaller**2 > 2 * uncertainty**2


def ratio(base: AutoStage, other: AutoStage, resamples: int = 1000) -> tuple[float, float, float]:
    """How many times smaller the RMSE is, and its 95 % interval by resampling the samples."""
    if other is base:
        return 1.0, 1.0, 1.0  # where it is exact, too
    generator = torch.Generator().manual_seed(0)
    count = len(base.squares)
    rows = torch.randint(count, (resamples, count), generator=generator, device="cpu")
    tiny = 1e-300
    drawn = (base.squares[rows].mean(1) / other.squares[rows].mean(1).clamp_min(tiny)).sqrt()
    low, high = torch.quantile(
        drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype, device="cpu")
    ).tolist()
    value = float((base.squares.mean() / other.squares.mean().clamp_min(tiny)).sqrt())
    return value, low, high
