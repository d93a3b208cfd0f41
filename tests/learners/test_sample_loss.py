"""Losses of finished samples."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlms_engine.learners.training.losses import resolve_kind, sample_loss
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM


def float_problem() -> Denoiser:
    return Denoiser(lambda x, t: x / (1 + t.reshape(-1, 1, 1, 1) ** 2), EDM(), "data")


def test_auto_takes_the_most_perceptual() -> None:
    denoiser, features = float_problem(), nn.Flatten()
    assert resolve_kind("auto", denoiser, None, None) == "l2"
    assert resolve_kind("auto", denoiser, features, None) == "features"
    assert resolve_kind("auto", denoiser, features, "weights.safetensors") == "lpips"
    tapped = Denoiser(nn.Sequential(nn.Identity()), EDM(), "data", features="0")
    assert resolve_kind("auto", tapped, None, None) == "bottleneck"
    assert resolve_kind("l1", tapped, features, "weights.safetensors") == "l1"


def test_values() -> None:
    a, b = torch.full((2, 3, 4, 4), 3.0), torch.ones(2, 3, 4, 4)
    assert torch.equal(sample_loss("l2", float_problem())(a, b), torch.full((2,), 4.0))
    assert torch.equal(sample_loss("l1", float_problem())(a, b), torch.full((2,), 2.0))
    features = sample_loss("features", float_problem(), feature_network=nn.Flatten())
    assert torch.equal(features(a, b), torch.full((2,), 4.0 * 48))


def test_lpips_goes_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    class LPIPS(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            assert options["net"] == "vgg" and options["pretrained"] is False
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (self.weight * (a - b).square()).mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))  # type: ignore[arg-type]
    path = tmp_path / "lpips.safetensors"
    save_file({"weight": torch.full((1,), 3.0)}, path)
    loss = sample_loss("lpips", float_problem(), lpips_weights=str(path))
    a, b = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert torch.equal(loss(a, b), torch.full((2,), 3.0))
    save_file({"other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"weights of lpips\.LPIPS"):
        sample_loss("lpips", float_problem(), lpips_weights=str(path))
