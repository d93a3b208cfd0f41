"""A tiny model for the command line: `--model cli_model:tiny`."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn

from dlms_engine.cli.model import Model
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.models.embedded import ReferenceStatistics
from dlms_engine.processes import EDM, RectifiedFlow

SHAPE = (3, 8, 8)
FEATURES = 4


class TinyNetwork(nn.Module):
    """F(x, c_noise) of a data distribution with a bend in it; `mid_block` is [B, 2, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Conv2d(3, 2, 1)
        self.out = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        hidden = self.mid_block(x).tanh()
        return self.out(hidden) * (1 + 0.1 * c_noise[:, None, None, None]) - 0.3 * x


class Means(nn.Module):
    """Features: the first four pixels."""

    num_features = FEATURES

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :FEATURES]


def tiny() -> Model:
    """The model with the features and reference statistics that `dlms evaluate` asks for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyNetwork().eval().requires_grad_(False)
    denoiser = Denoiser(network, EDM(), "edm", features="mid_block")
    eye = torch.eye(FEATURES, dtype=torch.float64)
    reference = ReferenceStatistics(100, torch.zeros(FEATURES, dtype=torch.float64), 0.2 * eye)
    return Model(denoiser, SHAPE, Means(), reference)


def dying() -> Model:
    """``tiny``; rank 1 of several processes is killed in its 150th evaluation, the first time."""
    held, calls = tiny(), 0

    def die(*_: object) -> None:
        nonlocal calls
        calls += 1
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if calls == 150 and os.environ.get("RANK") == "1" and not again:
            os.kill(os.getpid(), signal.SIGKILL)

    network = held.denoiser.network
    assert isinstance(network, nn.Module)
    network.register_forward_pre_hook(die)
    return held


def pair() -> tuple[Denoiser, tuple[int, ...]]:
    """The plain form: no features."""
    held = tiny()
    return held.denoiser, held.shape


def labelled() -> Model:
    """``tiny`` with a number a sample that the network is told."""
    held = tiny()

    class Labelled(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            out: Tensor = self.network(x, c_noise)
            return out + 0.1 * label.to(out.dtype).reshape(-1, 1, 1, 1)

    network = held.denoiser.network
    assert isinstance(network, nn.Module)
    denoiser = Denoiser(Labelled(network), EDM(), "edm")
    return Model(denoiser, SHAPE, conditions={"label": torch.arange(3.0)})


def unlabelled() -> tuple[Denoiser, tuple[int, ...]]:
    """``labelled`` whose labels are left to ``--conditions``."""
    held = labelled()
    return held.denoiser, held.shape


def plane() -> tuple[Denoiser, tuple[int, ...]]:
    """Points in the plane, which nobody can draw as a picture."""

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma[:, None] ** 2))

    return Denoiser(network, EDM(), "data"), (2,)


def wrong() -> str:
    """Not a model."""
    return "no model"


def flowing() -> Model:
    """A rectified flow with a label a sample."""
    held = labelled()
    denoiser = Denoiser(held.denoiser.network, RectifiedFlow(), "velocity")
    return Model(denoiser, SHAPE, conditions=held.conditions)
