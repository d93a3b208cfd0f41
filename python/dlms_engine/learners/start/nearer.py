"""Whether one solver ends nearer to the exact solution than another, beyond chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
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
    """Of squared errors ``[B]`` by name: the smallest mean first, then all it is not surely below.

    One that is equal to a nearer one in every sample is left out, as are those that are not finite.
    """
    means = {name: float(square.mean()) for name, square in squares.items()}
    first, *others = sorted(means, key=means.__getitem__)
    found = [first]
    for name in others:
        open_ = math.isfinite(means[name]) and not wins(squares[name] - squares[first])
        if open_ and not any(torch.equal(squares[name], squares[one]) for one in found):
            found.append(name)
    return found


def contest(
    names: Iterable[str],
    measure: Callable[[list[str], range], Mapping[str, Tensor]],
    first: int,
    most: int,
    always: Iterable[str] = (),
) -> tuple[dict[str, Tensor], list[str]]:
    """Twice as many samples for those that are tied, until one is ahead or ``most`` would be exceeded.

    Args:
        names: who takes part.
        measure: squared errors ``[B]`` by name, of those named on the samples of a range.
        first: samples of the first round.
        most: largest number of samples.
        always: who is measured in every round.

    Returns:
        All squared errors, and the names of those that are left, the nearest first.
    """
    found = dict(measure(list(names), range(first)))
    left, count = tied(found), first
    while len(left) > 1 and 2 * count <= most:
        again = measure(list(dict.fromkeys([*always, *left])), range(count, 2 * count))
        found |= {name: torch.cat([found[name], more]) for name, more in again.items()}
        left, count = tied({name: found[name] for name in left}), 2 * count
    return found, left


def wins(gain: Tensor) -> bool:
    """Whether a mean gain is positive by two standard errors, a few more of a few samples."""
    count = len(gain)
    if count < 2:
        return False
    error = float(gain.std()) / math.sqrt(count)
    return math.isfinite(error) and float(gain.mean()) > 2 * (1 + 4 / count) * error
