"""Whether one solver ends nearer to the exact solution than another, beyond chance."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

LESS = 0.9
"""RMSE, as a share of the other's, below which logarithms may decide."""


def rmse_of(squares: Tensor) -> float:
    """Root of the mean of the squared errors ``[B]`` of samples."""
    return math.sqrt(float(squares.mean()))


def nearer(one: Tensor, other: Tensor, less: float = LESS) -> bool:
    """Of squared errors ``[B]`` of the same samples: whether ``one`` is smaller by two standard errors.

    Where a few samples, which end in another mode of the data, hold most of the squared error, its mean
    says little: there the logarithms decide, if the RMSE is below ``less`` of the other's, too.
    """
    if wins(other - one):
        return True
    gain = other.clamp_min(1e-300).log() - one.clamp_min(1e-300).log()
    return float(one.mean()) < less**2 * float(other.mean()) and wins(gain)


def tied(squares: Mapping[str, Tensor]) -> list[str]:
    """Of squared errors ``[B]`` by name: the smallest mean first, then all it is not surely below."""
    means = {name: float(square.mean()) for name, square in squares.items()}
    best = min(means, key=means.__getitem__)
    others = (name for name in squares if name != best and math.isfinite(means[name]))
    return [best, *(name for name in others if not wins(squares[name] - squares[best]))]


def wins(gain: Tensor) -> bool:
    """Whether a mean gain is positive by two standard errors, a few more of a few samples."""
    count = len(gain)
    if count < 2:
        return False
    error = float(gain.std()) / math.sqrt(count)
    return math.isfinite(error) and float(gain.mean()) > 2 * (1 + 4 / count) * error
