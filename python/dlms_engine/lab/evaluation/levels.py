"""Samples at noise levels around their own size, where what a network knows of them shows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...processes import Process

_LEVELS = (0.15, 0.5, 1.0, 2.0, 5.0)
"""sigma / alpha, in units of the data's standard deviation, where data are denoised."""


class Noisy(NamedTuple):
    """Samples ``x`` ``[B, ...]`` of the process at time ``t`` (float64, ``[]``), where ``ratio`` is its
    sigma / alpha.
    """

    x: Tensor
    t: Tensor
    ratio: float


def require_samples(samples: Any, shape: tuple[int, ...] | None) -> None:
    """Raises unless ``samples`` are ``[B, *shape]``, of any shape where it is None.

    Raises:
        TypeError: they are no tensor.
        ValueError: they are whole numbers, none, or of another shape.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples are {type(samples).__name__}, expected a tensor [B, ...]")
    if not samples.is_floating_point():
        raise ValueError(
            f"samples are {samples.dtype}, expected floating point, in the range that the network was "
            "trained on (of images often -1 to 1)"
        )
    wanted = "[B, ...]" if shape is None else f"[B, {', '.join(map(str, shape))}]"
    other = shape is not None and tuple(samples.shape[1:]) != tuple(shape)
    if samples.ndim < 2 or len(samples) == 0 or other:
        raise ValueError(f"samples are {list(samples.shape)}, expected {wanted}")


def deviation_of(data: Tensor) -> float:
    """Standard deviation of ``data``; 0 where it has none that is finite."""
    deviation = float(data.std()) if bool(data.isfinite().all()) else 0.0
    return deviation if 0 < deviation < math.inf else 0.0


def noisy(process: Process, data: Tensor) -> list[Noisy]:
    """``data`` ``[B, ...]`` with the same noise at each level; nothing where it has no deviation."""
    deviation = deviation_of(data)
    if not deviation:
        return []
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(data.shape, generator=generator).to(data)
    found = []
    for ratio in _levels(process, deviation):
        t = process.inverse_sigma(torch.tensor(ratio, dtype=torch.float64))
        alpha = float(process.alpha(t))
        found.append(Noisy(alpha * data + alpha * ratio * noise, t, ratio))
    return found


def _levels(process: Process, deviation: float) -> list[float]:
    """Sigma / alpha around the data's deviation; in the process's range, whatever that is."""
    low, high = (float(process.sigma_over_alpha(t)) for t in (process.t_min, process.t_max))
    around = [level * deviation for level in _LEVELS]
    inside = [level for level in around if low <= level <= high]
    if inside:
        return inside
    # data far smaller or larger than any noise: the nearest levels that there are
    edge = min(max(deviation, 1.01 * low), 0.99 * high)
    return [level for level in (0.5 * edge, edge, 2 * edge) if low <= level <= high]
