"""The published score networks are read as their files are laid out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

PATH = Path(__file__).parents[2] / "examples" / "published_score_network.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_score_network", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _written(network: torch.nn.Module) -> list[Tensor]:
    """The arrays in the published order, biases of convolutions as [C, 1, 1]."""
    arrays = [network.first.weight, network.first.bias[:, None, None]]
    arrays += [network.last.weight.transpose(0, 1).flip(2, 3), network.last.bias[:, None, None]]
    for block in network.blocks:
        for mlp in (block.patches, block.channels):
            arrays += [mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias]
        arrays += [block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias]
    return [*arrays, network.norm.weight, network.norm.bias]


def test_arrays_are_read_in_the_published_order(example: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, other = example.ScoreNetwork(8), example.ScoreNetwork(8)
    path = tmp_path / "network.eqx"
    with path.open("wb") as file:
        for array in _written(network):
            np.save(file, array.detach().contiguous().numpy())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    assert not torch.equal(network(x, t), other(x, t))  # planted
    with path.open("rb") as file:
        other.read(file)
    assert torch.equal(network(x, t), other(x, t))


def test_published_network_denoises(example: ModuleType) -> None:
    """Needs the weights: pip install --no-deps galaxygrad==0.1.9."""
    import dlms_engine

    try:
        denoiser, shape = example.hsc32()
    except ImportError as error:
        pytest.skip(str(error))
    assert dlms_engine.check(denoiser, shape=shape, count=4).ok
