"""Measuring samplers: Frechet distance (embedded features) and endpoint error."""

from .frechet import (
    FeatureSums,
    FrechetDistance,
    feature_sums,
    frechet_distance,
    sums_from_moments,
)
from .trajectory import endpoint_rmse, endpoint_rmse_per_sample

__all__ = [
    "FeatureSums",
    "FrechetDistance",
    "endpoint_rmse",
    "endpoint_rmse_per_sample",
    "feature_sums",
    "frechet_distance",
    "sums_from_moments",
]
