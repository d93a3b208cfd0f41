"""Start noise: a sample's own, whatever the batch it is drawn in."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..support.values import seed_number, whole_number

Rng = Literal["cpu", "device"]
"""Where start noise is drawn."""


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    scale: float = 1.0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rng: Rng = "cpu",
) -> Tensor:
    """``scale * z`` with one generator per sample, so a sample does not depend on its batch.

    Args:
        seeds: one integer per sample, 0 to 2^64 - 1.
        shape: shape of one sample, e.g. ``(3, 32, 32)``.
        scale: standard deviation, sigma_max for EDM.
        rng: "cpu" draws there and moves the noise once, so that every device agrees; "device" draws
            where it is wanted, which saves the copy and gives other numbers on every kind of GPU.

    Returns:
        ``[len(seeds), *shape]``, drawn in float32.

    Raises:
        ValueError: a seed is negative or beyond 64 bits, a size is none, or there is no such ``rng``.
        TypeError: ``seeds`` is one number.
    """
    if rng not in ("cpu", "device"):
        raise ValueError(f"rng is {rng!r}, expected 'cpu' or 'device'")
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds is {seeds!r}, expected one number a sample, such as range(8)")
    whole = [seed_number(s) for s in seeds]
    shape = [whole_number(size, "a size in shape") for size in shape]
    value: object = scale
    if not (isinstance(value, numbers.Real | Tensor) and 0 <= float(value) < math.inf):
        raise ValueError(f"scale is {scale!r}, expected a finite number >= 0")
    if not whole:
        return torch.empty((0, *shape), dtype=dtype, device=device)
    place = torch.device(device if rng == "device" else "cpu")
    generators = (torch.Generator(place).manual_seed(s) for s in whole)
    draws = [
        torch.randn(*shape, generator=g, device=place, dtype=torch.float32) for g in generators
    ]
    return torch.stack(draws).to(dtype).mul_(scale).to(device)
