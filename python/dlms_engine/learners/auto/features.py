"""The network's own features of finished samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ..start import SamplingProblem

FEATURE_SIGMA = 0.1
"""Noise level at which they are read."""


def features_of(
    problem: SamplingProblem, samples: Tensor, numbers: range, batch: int = 128
) -> Tensor | None:
    """``[B, F]``, the tapped module's output at a low noise level; None without a tap."""
    if problem.denoiser.features is None:
        return None
    parts = [
        feature_batch(problem, samples[low : low + batch], numbers[low : low + batch])
        for low in range(0, len(samples), batch)
    ]
    return torch.cat(parts)


def feature_batch(problem: SamplingProblem, samples: Tensor, numbers: range) -> Tensor:
    """The same for one batch, with gradient in ``samples``."""
    process = problem.process
    level = process.inverse_sigma(torch.tensor(FEATURE_SIGMA, dtype=torch.float64))
    x = float(process.alpha(level)) * samples
    problem.predict(x, level.to(x.device), numbers)
    return problem.denoiser.bottleneck.float().flatten(1)
