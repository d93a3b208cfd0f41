"""Frechet distance against closed forms, sharding, and the embedded reference."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from dlms_engine.lab.evaluation import (
    FrechetDistance,
    endpoint_rmse,
    endpoint_rmse_per_sample,
    feature_sums,
    frechet_distance,
    sums_from_moments,
)
from dlms_engine.lab.evaluation.frechet import label_of_features
from dlms_engine.models.embedded import FeatureNetwork, ReferenceStatistics

pytest.importorskip("torchmetrics")


class Pixels(nn.Module):
    """The first four pixels as features."""

    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4]


def test_a_distance_is_named_by_whose_features_it_measures() -> None:
    named = Pixels()
    named.label = "FID"  # type: ignore[assignment]
    assert label_of_features(named) == "FID"
    assert label_of_features(FeatureNetwork()) == "Frechet distance (embedded features)"
    assert label_of_features(Pixels()) == "Frechet distance (the model's own features)"


def gaussian(mean: list[float], variances: list[float]) -> ReferenceStatistics:
    return ReferenceStatistics(
        1000, torch.tensor(mean).double(), torch.diag(torch.tensor(variances).double())
    )


def test_diagonal_gaussians_have_the_closed_form() -> None:
    a, b = gaussian([0.0, 1.0], [4.0, 9.0]), gaussian([3.0, 1.0], [1.0, 16.0])
    # |3|^2 + (2 - 1)^2 + (3 - 4)^2
    assert frechet_distance(a, b) == pytest.approx(11.0, abs=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


def test_correlated_gaussians_match_an_independent_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(50, 5, generator=generator).double() for _ in range(2)]
    draws[1] = draws[1] @ torch.randn(5, 5, generator=generator).double() + 0.3
    a, b = (feature_sums(d).moments() for d in draws)
    # tr (A^1/2 B A^1/2)^1/2 through symmetric square roots
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert torch.allclose(a.covariance, draws[0].T.cov(), atol=1e-12)


def test_moments_round_trip_and_merge_is_one_pass() -> None:
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(1)).double() + 2
    whole = feature_sums(features)
    parts = feature_sums(features[:33]).merge(feature_sums(features[33:]))
    again = sums_from_moments(whole.moments())
    for candidate in (parts, again):
        for have, want in zip(candidate, whole, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_shards_equal_the_whole_and_a_lost_shard_is_seen() -> None:
    samples = torch.rand(90, 3, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    target = feature_sums(torch.randn(200, 4, generator=torch.Generator().manual_seed(3)))
    whole, first, second = (FrechetDistance(Pixels()) for _ in range(3))
    whole.update(samples, batch=7)
    first.update(samples[:50])
    second.update(samples[50:])
    lost = first.distance_to(target)
    first.merge(second)
    assert int(first.sums.images) == 90
    assert first.sums.total.dtype == first.sums.outer.dtype == torch.float64
    assert first.distance_to(target) == pytest.approx(whole.distance_to(target), rel=1e-12)
    assert lost != pytest.approx(whole.distance_to(target), rel=1e-6)


def test_samples_out_of_range_are_clamped_and_nan_refused() -> None:
    distance = FrechetDistance(Pixels())
    distance.update(torch.full((2, 3, 4, 4), 5.0))
    assert float(distance.sums.total.max()) == 2.0
    broken = torch.zeros(3, 3, 4, 4)
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 samples are not finite"):
        distance.update(broken)


def test_bad_sets_are_refused() -> None:
    one = feature_sums(torch.zeros(1, 4))
    two = feature_sums(torch.randn(5, 4))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(two, one)
    with pytest.raises(ValueError, match="features"):
        frechet_distance(two, feature_sums(torch.randn(5, 3)))
    with pytest.raises(ValueError, match="cannot merge"):
        two.merge(feature_sums(torch.randn(5, 3)))


def test_embedded_features_rank_noise_behind_a_blur() -> None:
    """Against the training images, white noise must be farther away than grey images with the
    images' brightness spread; both far from zero."""
    generator = torch.Generator().manual_seed(4)
    noise, smooth = FrechetDistance(), FrechetDistance()
    noise.update(torch.randn(200, 3, 16, 16, generator=generator))
    coarse = torch.randn(200, 3, 3, 3, generator=generator) * 0.5
    smooth.update(nn.functional.interpolate(coarse, size=16, mode="bicubic"))
    assert noise.distance_to() > smooth.distance_to() > 1.0


def test_without_torchmetrics_the_error_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install 'dlms_engine\[evaluation\]'"):
        FrechetDistance(Pixels())


def test_endpoint_rmse() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    samples = reference.clone()
    samples[1] = 3.0
    assert endpoint_rmse_per_sample(samples, reference).tolist() == [0.0, 3.0]
    assert endpoint_rmse(samples, reference) == pytest.approx((9 / 2) ** 0.5)
    with pytest.raises(ValueError, match="differ in shape"):
        endpoint_rmse(samples, reference[:1])
