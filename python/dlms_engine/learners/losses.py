"""Distances of finished samples: the network's own bottleneck or a feature network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser

FeatureDistance = Callable[[Tensor, Tensor], Tensor]
"""(student, teacher) ``[B, ...]`` -> ``[B]`` squared distances, with gradient in the student."""


def last_step_distance(
    denoiser: Denoiser, kind: str, sigma: float, feature_network: nn.Module | None
) -> FeatureDistance | None:
    """The distance named ``kind``; None for plain pixels.

    Raises:
        ValueError: unknown kind, no feature network or no feature tap where one is needed.
    """
    if kind == "pixels":
        return None
    if kind == "features":
        if feature_network is None:
            raise ValueError(
                "last_step='features' needs feature_network=, a module from images to [B, F]; "
                "last_step='bottleneck' uses the denoiser itself"
            )
        return _distance(_frozen(feature_network))
    if kind == "bottleneck":
        if denoiser.features is None:
            raise ValueError(
                "last_step='bottleneck' needs the Denoiser's feature tap: features='mid_block'"
            )
        return _distance(bottleneck_features(denoiser, sigma))
    raise ValueError(f"last_step is {kind!r}, expected 'pixels', 'bottleneck' or 'features'")


def bottleneck_features(denoiser: Denoiser, sigma: float) -> Callable[[Tensor], Tensor]:
    """``[B, ...]`` finished samples -> ``[B, F]``, the bottleneck at noise level ``sigma``.

    No noise is added: the network is asked at a time whose sigma / alpha is ``sigma``, where its
    features respond to structure and not to single pixels.
    """
    level = denoiser.process.inverse_sigma(torch.tensor(sigma, dtype=torch.float64))

    def features(x: Tensor) -> Tensor:
        scale = float(denoiser.process.alpha(level))
        denoiser.predict(scale * x, level)
        return denoiser.bottleneck.float().flatten(1)

    return features


def _frozen(network: nn.Module) -> Callable[[Tensor], Tensor]:
    network.eval().requires_grad_(False)

    def features(x: Tensor) -> Tensor:
        out = network(x)
        assert isinstance(out, Tensor)
        return out.flatten(1)

    return features


def _distance(features: Callable[[Tensor], Tensor]) -> FeatureDistance:
    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features(teacher)
        return (features(student) - wanted).square().sum(1)

    return distance
