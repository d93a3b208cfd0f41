"""The shipped model: right files, right interface, and it really denoises."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys

import pytest
import torch

from dlms_engine import embedded

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def denoiser():  # type: ignore[no-untyped-def]
    return embedded.load_embedded()


def heun(denoiser, x: torch.Tensor, steps: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """EDM's Heun sampler, written out so that the test does not lean on the library's."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = embedded.SIGMA_MIN ** (1 / 7), embedded.SIGMA_MAX ** (1 / 7)
    levels = [*((high + ramp * (low - high)) ** 7).tolist(), 0.0]
    with torch.no_grad():
        for now, after in itertools.pairwise(levels):
            slope = (x - denoiser(x, now)) / now
            moved = x + (after - now) * slope
            if after > 0:
                slope = (slope + (moved - denoiser(moved, after)) / after) / 2
                moved = x + (after - now) * slope
            x = moved
    return x


def test_files_are_the_ones_provenance_describes() -> None:
    provenance = embedded.embedded_provenance()
    sizes = {}
    for name, digest in provenance["sha256"].items():
        content = (embedded.assets_path() / name).read_bytes()
        sizes[name] = len(content)
        assert hashlib.sha256(content).hexdigest() == digest, name
    assert sum(sizes.values()) < 4 * 2**20
    assert provenance["data"]["name"] == "CIFAR-10"
    assert provenance["model"]["images_seen"] >= 2_000_000
    assert provenance["features"]["test_accuracy"] > 0.7
    parameters = sum(p.numel() for p in embedded.embedded_network().parameters())
    assert parameters == provenance["model"]["parameters"] <= 2_000_000


def test_tap_gives_64_numbers_per_image(denoiser) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, *embedded.IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))
    denoiser(x, 1.0)
    assert denoiser.last_features.shape == (3, 64)
    assert denoiser.last_features.std() > 0


def test_denoises_close_to_its_training_loss(denoiser) -> None:  # type: ignore[no-untyped-def]
    """E[x0 | x] of the model's own samples at sigma 0.5: a wrong c_noise scale, preconditioning or
    weight file costs far more than the margin. The trivial estimate c_skip * x has RMSE ~0.35."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(32, *embedded.IMAGE_SHAPE, generator=generator)
    clean = heun(denoiser, noise * embedded.SIGMA_MAX, 18)
    sigma = 0.5
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator)

    def rmse(time_scale: float) -> float:
        with torch.no_grad():
            pre = denoiser.preconditioning(torch.tensor(sigma))
            raw = denoiser.network(pre.c_in.float() * noisy, time_scale * pre.c_noise.expand(32))
            estimate = pre.c_skip.float() * noisy + pre.c_out.float() * raw
        return math.sqrt(float((estimate - clean).square().mean()))

    assert clean.std() == pytest.approx(embedded.SIGMA_DATA, rel=0.35)
    assert rmse(1.0) < 0.24
    assert rmse(10.0) > 1.1 * rmse(1.0)  # the planted fault is seen


def test_bfloat16_and_float64_networks(denoiser) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, *embedded.IMAGE_SHAPE, generator=torch.Generator().manual_seed(2))
    wide = embedded.load_embedded(dtype=torch.float64)(x.double(), 2.0)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(denoiser(x, 2.0).double(), wide, atol=1e-4, rtol=1e-4)
    half = embedded.load_embedded(dtype=torch.bfloat16)(x, 2.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), wide, atol=0.1, rtol=0.1)


def test_features_are_per_sample_and_differentiable() -> None:
    network = embedded.embedded_features()
    x = torch.rand(4, *embedded.IMAGE_SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    x.requires_grad_(True)
    both = network(x)
    assert both.shape == (4, embedded.FeatureNetwork.num_features)
    torch.testing.assert_close(network(x[1:2]), both[1:2])  # no batch statistics
    both[0].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().max() > 0
    assert x.grad[1:].abs().max() == 0


def test_reference_statistics() -> None:
    reference = embedded.embedded_reference()
    assert reference.images == 50_000
    assert reference.mean.dtype == reference.covariance.dtype == torch.float64
    assert reference.mean.shape == (embedded.FeatureNetwork.num_features,)
    eigenvalues = torch.linalg.eigvalsh(reference.covariance)
    assert eigenvalues.min() > 0
    assert eigenvalues.mean() == pytest.approx(1.0, rel=0.02)  # the scale's definition


def test_without_diffusers_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'dlms_engine\[diffusers\]'"):
        embedded.embedded_network()
