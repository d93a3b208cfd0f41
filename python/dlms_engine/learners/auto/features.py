"""The network's own features of finished samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...support.transfer import to_host
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
    level = process.inverse_sigma(torch.tensor(FEATURE_SIGMA, dtype=torch.float64, device="cpu"))
    x = float(process.alpha(level)) * samples
    problem.predict(x, level.to(x.device), numbers)
    return problem.denoiser.bottleneck.float().flatten(1)


def projected_frechet(one: Tensor, two: Tensor, directions: int = 16) -> float:
    """Frechet distance of fixed random projections of ``one`` and ``two``, ``[B, ...]``.

    There are more features than samples; a covariance of sixteen directions is of full rank.
    """
    one, two = (to_host(values.flatten(1).double()) for values in (one, two))
    generator = torch.Generator().manual_seed(5)
    projection = torch.randn(one.shape[1], directions, generator=generator, dtype=torch.float64)
    if one.shape[1] <= directions:
        projection = torch.eye(one.shape[1], dtype=torch.float64)
    projection = projection / one.shape[1] ** 0.5

    if not bool(one.isfinite().all()):
        return math.inf
    first, second = one @ projection, two @ projection
    apart = (first.mean(0) - second.mean(0)).square().sum()
    a, b = (torch.cov(values.T).reshape(len(projection.T), -1) for values in (first, second))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(apart + a.trace() + b.trace() - 2 * cross))
