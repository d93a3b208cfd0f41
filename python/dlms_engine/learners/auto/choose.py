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
from ..start import ExactSolution, SamplingProblem, rmse_with_error, run_tables
from .features import features_of
from .runs import corrected_ends

HELD_OUT_FIRST = 1 << 22
"""Number of the first held-out sample, apart from those of proof, start and training."""


@dataclass
class AutoStage:
    """One candidate result: the base, the table, the table with one corrector or one a row.

    Attributes:
        squares: float64 ``[B]``, mean squared error of every held-out sample.
        features: float64 ``[B]``, squared feature distance; empty without a tap.
        calls, seconds: what making it took.
    """

    name: str
    policy: SolverTable | CorrectedPolicy
    calls: int = 0
    seconds: float = 0.0
    squares: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))

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
        }
        if len(self.features):
            found["feature_distance"] = float(self.features.mean())
            found["feature_error"] = float(self.features.std()) / math.sqrt(len(self.features))
        return found


@torch.no_grad()
def measure_stages(
    problem: SamplingProblem, exact: ExactSolution, stages: Sequence[AutoStage], samples: int
) -> None:
    """Fills ``squares`` and ``features`` of all ``stages``, on the same held-out samples."""
    numbers = range(HELD_OUT_FIRST, HELD_OUT_FIRST + samples)
    target = exact.solve(numbers)
    wanted = features_of(problem, target, numbers)
    for stage in stages:
        end = end_of(problem, stage.policy, numbers)
        stage.squares = (end - target).double().square().flatten(1).mean(1).cpu()
        if wanted is not None:
            seen = features_of(problem, end, numbers)
            assert seen is not None
            stage.features = (seen - wanted).double().square().sum(1).cpu()


def end_of(
    problem: SamplingProblem, policy: SolverTable | CorrectedPolicy, numbers: range
) -> Tensor:
    """End states ``[B, ...]`` of a stage."""
    if isinstance(policy, SolverTable):
        return run_tables(problem, [policy], numbers)[0]
    return corrected_ends(problem, policy, numbers)


def choose_stage(stages: Sequence[AutoStage]) -> AutoStage:
    """The simplest stage that no later one beats by two standard errors.

    A later stage, which is less simple, must also not be worse in feature distance by two standard
    errors. Differences are taken sample by sample.
    """
    chosen = stages[0]
    for stage in stages[1:]:
        if _wins(chosen.squares - stage.squares) and not _wins(stage.features - chosen.features):
            chosen = stage
    return chosen


def _wins(gain: Tensor) -> bool:
    """Whether a mean gain is positive by two standard errors."""
    if len(gain) < 2:
        return False
    error = float(gain.std()) / math.sqrt(len(gain))
    return math.isfinite(error) and float(gain.mean()) > 2 * error


def ratio(base: AutoStage, other: AutoStage, resamples: int = 1000) -> tuple[float, float, float]:
    """How many times smaller the RMSE is, and its 95 % interval by resampling the samples."""
    generator = torch.Generator().manual_seed(0)
    count = len(base.squares)
    rows = torch.randint(count, (resamples, count), generator=generator)
    tiny = 1e-300
    drawn = (base.squares[rows].mean(1) / other.squares[rows].mean(1).clamp_min(tiny)).sqrt()
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    value = float((base.squares.mean() / other.squares.mean().clamp_min(tiny)).sqrt())
    return value, low, high
