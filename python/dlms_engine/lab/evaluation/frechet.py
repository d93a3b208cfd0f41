"""Frechet distance (embedded features): how far a set of samples is from a set of images.

The distance between the Gaussians fitted to the features of two image sets (Heusel et al. 2017),
computed by torchmetrics' ``FrechetInceptionDistance`` with the embedded feature network in
Inception's place. It is a different number from FID and must not be quoted as one.

The state of a :class:`FrechetDistance` is a sum over images, so ranks may each see a part of the
samples and merge their states afterwards; the result is that of one pass over everything up to
float64 rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...models.embedded import (
    FeatureNetwork,
    ReferenceStatistics,
    embedded_features,
    embedded_reference,
)

LABEL = "Frechet distance (embedded features)"
"""The name this figure goes by in reports and plots."""


def label_of_features(features: object) -> str:
    """What the distance on these features is called: their own ``label``, or whose they are."""
    own = "Frechet distance (the model's own features)"
    return str(getattr(features, "label", LABEL if isinstance(features, FeatureNetwork) else own))


class FeatureSums(NamedTuple):
    """Mergeable sufficient statistics of F features.

    Attributes:
        images: int64 scalar, number of images.
        total: float64 ``[F]``, sum of the features.
        outer: float64 ``[F, F]``, sum of their outer products.
    """

    images: Tensor
    total: Tensor
    outer: Tensor

    def merge(self, other: FeatureSums) -> FeatureSums:
        """Statistics of both sets together.

        Raises:
            ValueError: the two have different numbers of features.
        """
        if self.total.shape != other.total.shape:
            raise ValueError(
                f"cannot merge statistics of {self.total.numel()} and "
                f"{other.total.numel()} features"
            )
        return FeatureSums(
            self.images + other.images, self.total + other.total, self.outer + other.outer
        )

    def moments(self) -> ReferenceStatistics:
        """Count, mean and unbiased covariance.

        Raises:
            ValueError: fewer than two images.
        """
        count = int(self.images)
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {count}")
        mean = self.total / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        return ReferenceStatistics(count, mean, covariance)


def feature_sums(features: Tensor) -> FeatureSums:
    """Sums of features ``[N, F]`` (any float dtype; accumulated in float64)."""
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected [N, F]")
    wide = features.detach().to(torch.float64)
    return FeatureSums(torch.tensor(len(wide)), wide.sum(0), wide.T @ wide)


def sums_from_moments(stats: ReferenceStatistics) -> FeatureSums:
    """The inverse of :meth:`FeatureSums.moments`."""
    mean = stats.mean.to(torch.float64)
    outer = (stats.images - 1) * stats.covariance.to(torch.float64)
    outer = outer + stats.images * torch.outer(mean, mean)
    return FeatureSums(torch.tensor(stats.images), stats.images * mean, outer)


class _FromFeatures(nn.Module):
    """Identity for torchmetrics: the features were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(feature: nn.Module) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            f"the {LABEL} is computed by torchmetrics: pip install 'dlms_engine[evaluation]'"
        ) from error
    # normalize=True: floating-point input; a custom feature module gets it untouched. The sums
    # are float64 as they are; set_dtype(float64) would widen the feature network too.
    # Ranks merge their sums themselves; torchmetrics would add up what all of them hold already.
    return FrechetInceptionDistance(feature=feature, normalize=True, sync_on_compute=False)


def require_torchmetrics() -> None:
    """Ahead of the work.

    Raises:
        ImportError: torchmetrics is missing.
    """
    _metric(_FromFeatures(1))


def _fill(metric: Any, sums: FeatureSums, side: str) -> None:
    """Puts sums into torchmetrics' documented-by-use state tensors of one side."""
    setattr(metric, f"{side}_features_num_samples", sums.images.to(torch.int64))
    setattr(metric, f"{side}_features_sum", sums.total)
    setattr(metric, f"{side}_features_cov_sum", sums.outer)


def frechet_distance(
    a: FeatureSums | ReferenceStatistics, b: FeatureSums | ReferenceStatistics
) -> float:
    """Squared Frechet distance of the Gaussians with the moments of ``a`` and ``b``.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64. It is biased
    upwards by a finite count: compare sets of equal size only.

    Raises:
        ValueError: different numbers of features, or fewer than two images on a side.
        ImportError: torchmetrics is missing.
    """
    first, second = (s if isinstance(s, FeatureSums) else sums_from_moments(s) for s in (a, b))
    for name, sums in (("first", first), ("second", second)):
        if int(sums.images) < 2:
            raise ValueError(f"the {name} set has {int(sums.images)} images, at least 2 are needed")
    width = first.total.numel()
    if width != second.total.numel():
        raise ValueError(f"the sets have {width} and {second.total.numel()} features")
    metric = _metric(_FromFeatures(width))
    _fill(metric, first, "real")
    _fill(metric, second, "fake")
    metric.orig_dtype = torch.float64  # set by update() otherwise, which has nothing left to do
    metric._update_count = 1  # silences torchmetrics' "compute before update" warning
    return float(metric.compute())


class FrechetDistance:
    """Accumulates the features of samples and gives their distance to another set.

        fd = FrechetDistance()
        for samples in batches:            # [B, 3, 16, 16] in [-1, 1]
            fd.update(samples)
        fd.distance_to(embedded_reference())

    Args:
        features: maps samples to features ``[B, F]`` and has ``num_features``; default: the
            embedded feature network.
        device: where the features are computed and summed.

    Raises:
        ImportError: torchmetrics is missing.
    """

    def __init__(
        self, features: nn.Module | None = None, device: torch.device | str = "cpu"
    ) -> None:
        network = embedded_features() if features is None else features
        self.device = torch.device(device)
        self._metric = _metric(network.eval()).to(self.device)

    @torch.no_grad()
    def update(self, samples: Tensor, batch: int = 500) -> None:
        """Adds samples ``[N, ...]`` in [-1, 1], ``batch`` at a time; values outside are clamped,
        as they are when an image is written.

        Raises:
            ValueError: a sample is not finite.
        """
        finite = torch.isfinite(samples).flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(f"{int((~finite).sum())} of {len(samples)} samples are not finite")
        for part in torch.split(samples, batch):
            pixels = part.to(self.device, torch.float32).clamp(-1, 1)
            self._metric.update(pixels, real=False)

    @property
    def sums(self) -> FeatureSums:
        """Mergeable statistics of everything seen so far, float64 on the CPU."""
        metric = self._metric
        return FeatureSums(
            cast(Tensor, metric.fake_features_num_samples).cpu().clone(),
            cast(Tensor, metric.fake_features_sum).cpu().clone(),
            cast(Tensor, metric.fake_features_cov_sum).cpu().clone(),
        )

    def merge(self, other: FrechetDistance | FeatureSums) -> None:
        """Adds what another rank or shard has seen."""
        theirs = other.sums if isinstance(other, FrechetDistance) else other
        merged = self.sums.merge(theirs)
        _fill(self._metric, FeatureSums(*(part.to(self.device) for part in merged)), "fake")

    def distance_to(
        self, other: FrechetDistance | FeatureSums | ReferenceStatistics | None = None
    ) -> float:
        """Distance to another set; None stands for the CIFAR-10 training images at 16x16.

        Raises:
            ValueError: fewer than two images on a side, or different features.
        """
        if other is None:
            other = embedded_reference()
        return frechet_distance(
            other.sums if isinstance(other, FrechetDistance) else other, self.sums
        )
