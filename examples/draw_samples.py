"""Pictures of what a training run has learnt: Heun's method, 18 noise levels, EDM's or uniform."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

LEVELS = 18
Slope = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def draw(
    network: Any,
    recipe: dict[str, Any],
    noise: Tensor,
    labels: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Samples like ``noise`` ``[B, 3, S, S]``, which has unit variance.

    Args:
        labels: ``[B]`` classes; ``guidance`` 1 leaves the unconditional branch out.
    """

    def raw(x: Tensor, c_noise: float) -> Tensor:
        time = x.new_full((len(x),), c_noise)
        output: Tensor = network(x, time, labels)
        if guidance != 1.0:
            other = network(x, time, None)
            output = other + guidance * (output - other)
        return output

    if recipe["prediction"] == "flow":
        times = torch.linspace(1, 0, LEVELS + 1, dtype=torch.float64).tolist()
        return heun(raw, noise, times)
    data = recipe["sigma_data"]
    ramp = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

    def slope(x: Tensor, sigma: float) -> Tensor:
        total = sigma**2 + data**2
        output = raw(x / total**0.5, torch.tensor(sigma).log().item() / 4)
        return (x - data**2 / total * x - sigma * data / total**0.5 * output) / sigma

    return heun(slope, noise * 80, [*sigmas.tolist(), 0.0])


def heun(slope: Slope, x: Tensor, times: list[float]) -> Tensor:
    """Heun's method for dx/dt = slope(x, t); Euler where it would end at 0."""
    for now, after in itertools.pairwise(times):
        first = slope(x, now)
        moved = x + (after - now) * first
        x = moved if after == 0 else x + (after - now) * (first + slope(moved, after)) / 2
    return x


def draw_rows(network: Any, recipe: dict[str, Any], classes: int, count: int, seed: int) -> Tensor:
    """``[rows, columns, 3, S, S]``: ``count`` samples of each class without and with guidance, or
    ``count`` squared of an unconditional model."""
    device = next(network.parameters()).device
    size, rows = recipe["network"]["size"], classes or count
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows * count, 3, size, size, generator=generator).to(device)
    noise = noise.to(memory_format=torch.channels_last)
    if not classes:
        return draw(network, recipe, noise).reshape(rows, count, 3, size, size)
    labels = torch.arange(classes, device=device).repeat_interleave(count)
    both = [draw(network, recipe, noise, labels, scale) for scale in (1.0, recipe["guidance"])]
    return torch.cat([part.reshape(rows, count, 3, size, size) for part in both], 1)


def picture(rows: Tensor, path: Path) -> None:
    """One PNG of images ``[rows, columns, 3, S, S]`` in [-1, 1], twice as large."""
    pixels = ((rows.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    count, columns, _, height, width = pixels.shape
    tiles = pixels.permute(0, 3, 1, 4, 2).reshape(count * height, columns * width, 3)
    image = Image.fromarray(tiles.contiguous().numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)
