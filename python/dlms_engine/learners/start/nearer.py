"""Whether one solver ends nearer to the exact solution than another, beyond chance."""

from __future__ import annotations

import math

from torch import Tensor

LESS = 0.9
"""RMSE, as a share of the other's, below which logarithms may decide."""


def nearer(one: Tensor, other: Tensor) -> bool:
    """Of squared errors ``[B]`` of the same samples: whether ``one`` is smaller by two standard errors.

    Where a few samples, which end in another mode of the data, hold most of the squared error, its mean
    says little: there the logarithms decide, if the RMSE is a tenth smaller too.
    """
    if wins(other - one):
        return True
    return float(one.mean()) < LESS**2 * float(other.mean()) and wins(log_gain(other, one))


def log_gain(one: Tensor, other: Tensor) -> Tensor:
    """``[B]`` log(one / other), of squared errors that may be 0."""
    return one.clamp_min(1e-300).log() - other.clamp_min(1e-300).log()


def wins(gain: Tensor) -> bool:
    """Whether a mean gain is positive by two standard errors, a few more of a few samples."""
    count = len(gain)
    if count < 2:
        return False
    error = float(gain.std()) / math.sqrt(count)
    return math.isfinite(error) and float(gain.mean()) > 2 * (1 + 4 / count) * error
