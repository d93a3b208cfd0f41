"""Features of a model's own for the Frechet distance, where there is no feature network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from ...models.denoiser import Denoiser

SIDE = 8
"""Pixels are averaged to at most this many a side: a covariance needs far more samples than features."""
MOST_VALUES = 256
"""Features of samples that are no images, at most."""
SIGMA = 0.1
"""sigma / alpha at which the network reads a finished sample: structure, not single pixels."""


class BottleneckFeatures(nn.Module):
    """Finished samples ``[B, ...]`` -> ``[B, C]``: the tapped bottleneck, averaged over space.

    The network reads the sample at sigma / alpha = ``SIGMA``; no noise is added. ``num_features`` is
    C, known after the first call.

    Raises:
        ValueError: the denoiser has no feature tap.
    """

    label = "Frechet distance (the model's own bottleneck)"

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        if denoiser.features is None:
            raise ValueError("the denoiser has no feature tap: Denoiser(..., features='mid_block')")
        # in a tuple: its parameters belong to the model, not to this module
        self._denoiser = (denoiser,)
        self.num_features = 0

    def forward(self, samples: Tensor) -> Tensor:
        denoiser = self._denoiser[0]
        level = denoiser.process.inverse_sigma(torch.tensor(SIGMA, dtype=torch.float64))
        denoiser.predict(float(denoiser.process.alpha(level)) * samples, level)
        raw = denoiser.bottleneck.float()
        pooled = raw.flatten(2).mean(2) if raw.ndim > 2 else raw
        self.num_features = int(pooled.shape[1])
        return pooled


class PixelFeatures(nn.Module):
    """Finished samples ``[B, *shape]`` -> ``[B, F]``: the values themselves, averaged to few.

    Images ``[C, H, W]`` to at most 8 x 8 a channel, anything else to at most 256 values.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        if len(shape) == 3:
            self.side = (min(SIDE, shape[1]), min(SIDE, shape[2]))
            self.num_features = shape[0] * self.side[0] * self.side[1]
            kept = f"averaged to {self.side[0]} x {self.side[1]}"
            whole = self.side == (shape[1], shape[2])
        else:
            self.num_features = min(MOST_VALUES, math.prod(shape))
            kept = f"averaged to {self.num_features}"
            whole = self.num_features == math.prod(shape)
        self.label = f"Frechet distance (values{'' if whole else f' {kept}'})"

    def forward(self, samples: Tensor) -> Tensor:
        if len(self.shape) == 3:
            return adaptive_avg_pool2d(samples, self.side).flatten(1)
        flat = samples.flatten(1)
        return flat if flat.shape[1] <= MOST_VALUES else adaptive_avg_pool1d(flat, MOST_VALUES)


def own_features(
    denoiser: Denoiser, shape: tuple[int, ...], *, conditional: bool = False
) -> nn.Module:
    """The model's bottleneck where it is tapped, else its values; ``label`` says which.

    Args:
        conditional: the network cannot be called without conditions, so that it reads no samples.
    """
    if denoiser.features is not None and not conditional and denoiser.guidance_scale is None:
        return BottleneckFeatures(denoiser)
    return PixelFeatures(shape)
