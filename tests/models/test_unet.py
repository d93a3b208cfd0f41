"""The package's own U-Net: shapes, conditioning, dtypes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlms_engine.models.denoiser import Denoiser
from dlms_engine.models.unet import UNet
from dlms_engine.processes import EDM

SMALL: dict[str, Any] = {
    "size": 16, "channels": (8, 16), "layers": 1, "attention": (1,), "head": 8, "groups": 4,
}  # fmt: skip


def network(**changes: Any) -> UNet:
    """A small U-Net whose output is not 0, as a fresh one's is."""
    torch.manual_seed(0)
    made = UNet(**{**SMALL, **changes}).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("patch", [1, 2])
def test_output_is_like_the_input_and_a_fresh_network_answers_zero(patch: int) -> None:
    x, c_noise = torch.randn(3, 3, 16, 16), torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(UNet(**{**SMALL, "patch": patch})(x, c_noise), torch.zeros_like(x))
    made = network(patch=patch)
    assert made(x, c_noise).shape == x.shape
    assert float(made(x, c_noise).std()) > 0


def test_samples_do_not_see_each_other() -> None:
    made = network().double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    c_noise = torch.linspace(-1, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(made(x, c_noise)[2:3], made(x[2:3], c_noise[2:3]))


def test_time_and_class_matter_and_no_class_is_the_last() -> None:
    made = network(classes=3)
    x = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    c_noise = torch.tensor([0.1, 0.4])
    first, second = made(x, c_noise)
    assert not torch.allclose(first, second)
    labels = torch.tensor([0, 1])
    one, other = made(x, c_noise[:1].expand(2), labels)
    assert not torch.allclose(one, other)
    assert torch.equal(made(x, c_noise), made(x, c_noise, torch.tensor([3, 3])))


def test_time_embedding_is_smooth() -> None:
    """Neighbouring noise levels get neighbouring embeddings: half a step, half the difference."""
    made = network()
    at = made.embedding(torch.tensor([0.2, 0.2 + 1e-2, 0.2 + 2e-2], dtype=torch.float64).float())
    whole, half = (at[2] - at[0]).norm(), (at[1] - at[0]).norm()
    assert float(whole / half) == pytest.approx(2.0, rel=0.05)


def test_float64_reference_bounds_the_half_precisions() -> None:
    wide = network().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    c_noise = torch.tensor([-0.5, 0.7], dtype=torch.float64)
    expected = wide(x, c_noise)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        found = network().to(dtype)(x.to(dtype), c_noise.float())
        assert found.dtype == dtype
        assert float((found.double() - expected).norm() / expected.norm()) < bound


def test_the_middle_block_is_tapped() -> None:
    denoiser = Denoiser(network(), EDM(), "edm", features="mid_block")
    denoiser(torch.randn(2, 3, 16, 16), 1.5)
    assert denoiser.last_features.shape == (2, 64)
    assert float(denoiser.last_features.std()) > 0


def test_guidance_doubles_the_batch_with_the_class_without_a_name() -> None:
    made = network(classes=3)
    null = torch.tensor([3])
    guided = Denoiser(
        made, EDM(), guidance_scale=2.0, unconditional={"class_labels": null}, sigma_data=0.8
    )
    plain = Denoiser(made, EDM(), sigma_data=0.8)
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    with_class, without = plain(x, 1.0, class_labels=labels), plain(x, 1.0)
    expected = without + 2 * (with_class - without)
    torch.testing.assert_close(guided(x, 1.0, class_labels=labels), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_class, without)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 18, expected a multiple of 4"):
        UNet(**{**SMALL, "size": 18, "patch": 2})
    with pytest.raises(ValueError, match="divisible by groups = 3"):
        UNet(**{**SMALL, "groups": 3})
    with pytest.raises(ValueError, match="divisible by groups = 4, and those with attention by"):
        UNet(**{**SMALL, "head": 12})
    with pytest.raises(ValueError, match="the network is unconditional"):
        network()(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
