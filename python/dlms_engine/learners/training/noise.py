"""Start noise of a distillation, a pure function of seed and index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def unit_noise(
    seed: int,
    indices: range,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """``[len(indices), *shape]`` float32 noise, each sample from its own generator.

    Drawn on the CPU, so that every device trains on the same numbers, and moved once.

    Depends on (seed, index) alone, so any split over batches, ranks or restarts agrees. The CPU's
    generator takes 32 bits of a seed; training has the upper half of them to itself, away from the
    small seeds that people sample and measure with.
    """
    generator = torch.Generator()
    draws = []
    for index in indices:
        generator.manual_seed((1 << 31) | (_mix(seed, index) >> 33))
        draws.append(torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu"))
    noise = (
        torch.stack(draws) if draws else torch.empty(0, *shape, dtype=torch.float32, device="cpu")
    )
    return noise.to(device)


def tell_first_sample(denoiser: Any, number: int) -> None:
    """Numbers the next batch, for denoisers whose samples differ in their conditioning."""
    tell = getattr(denoiser, "first_sample", None)
    if tell is not None:
        tell(number)


@contextmanager
def numbered_as_before(denoiser: Any) -> Iterator[None]:
    """The next batch is numbered after the block as it was before it, whatever is run inside."""
    number = getattr(denoiser, "next_sample", None)
    yield
    if number is not None:
        tell_first_sample(denoiser, number)


def _mix(seed: int, index: int) -> int:
    """64 well-mixed bits of two integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
