"""FID's features: given weights alone, no pickled code, rounded for measuring and not for training."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlms_engine.checkpoints.restricted import UnsafeCheckpointError
from dlms_engine.lab.reproduce.inception import (
    DecodedFeatures,
    InceptionFeatures,
    read_fid_statistics,
    read_inception,
)

WIDTH = 2048


class StandIn(nn.Module):
    """Torch-fidelity's interface: whole numbers in, a tuple of features out, layers up to ``fc``."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features == [str(WIDTH)]
        self.first = nn.Conv2d(3, WIDTH, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTH, 1)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        assert x.dtype == torch.uint8
        return (self.pool(self.first((x.float() - 128) / 128)).flatten(1),)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("torchmetrics")
    found: dict[str, Any] = {
        "torch_fidelity": {},
        "torch_fidelity.feature_extractor_inceptionv3": {"FeatureExtractorInceptionV3": StandIn},
        "torch_fidelity.interpolate_compat_tensorflow": {
            "interpolate_bilinear_2d_like_tensorflow1x": lambda x, **_: x
        },
    }
    for name, held in found.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    shapes = {"first.weight": (WIDTH, 3, 1, 1), "first.bias": (WIDTH,)}
    shapes |= {"fc.weight": (1, WIDTH), "fc.bias": (1,)}
    path = tmp_path / "weights.pth"
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, path)
    return path


def test_both_ways_give_the_same_features_of_whole_pixels(weights: Path) -> None:
    network = read_inception(weights)
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    whole = ((127.5 * images + 128).clamp(0, 255).to(torch.uint8).float() - 128) / 127.5
    measured = InceptionFeatures(network)(images)
    assert measured.shape == (2, WIDTH)
    trained = InceptionFeatures(network, rounded=False)
    assert torch.allclose(trained(whole), measured, atol=1e-5)
    assert not torch.allclose(trained(images), measured, atol=1e-4)  # planted: not rounded
    assert torch.equal(DecodedFeatures(InceptionFeatures(network), lambda x: x)(images), measured)
    images.requires_grad_()
    trained(images).sum().backward()
    assert images.grad is not None and bool(images.grad.abs().sum() > 0)


def test_weights_that_are_more_than_tensors_are_refused(weights: Path, tmp_path: Path) -> None:
    planted = tmp_path / "code.pth"
    planted.write_bytes(pickle.dumps(print))
    with pytest.raises(UnsafeCheckpointError):
        read_inception(planted)
    other = tmp_path / "other.pth"
    torch.save({"first.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="does not fit"):
        read_inception(other)
    with pytest.raises(FileNotFoundError, match="github.com/toshas/torch-fidelity"):
        read_inception(tmp_path / "absent.pth")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'dlms-engine\[fid\]'"):
        read_inception(tmp_path / "weights.pth")


def test_statistics_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, mu=np.ones(WIDTH), sigma=np.eye(WIDTH, dtype=np.float32))
    found = read_fid_statistics(path)
    assert found.mean.dtype == torch.float64 and found.covariance.shape == (WIDTH, WIDTH)
    np.savez(path, mu=np.ones(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="expected \\(2048,\\)"):
        read_fid_statistics(path)
    np.savez(path, mean=np.ones(WIDTH))
    with pytest.raises(ValueError, match=r"holds \['mean'\], expected mu and sigma"):
        read_fid_statistics(path)
    np.savez(path, mu=np.array([print]), sigma=np.eye(2))
    with pytest.raises(ValueError, match="plain arrays"):
        read_fid_statistics(path)
