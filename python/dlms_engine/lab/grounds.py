"""Small models that nothing was tuned on, trained on the spot: a learner must do well on them too.

Each is trained here, deterministically, on data drawn from a formula: a plane (a pinwheel of five
arms) and 8x8 images (soft bars and blobs). Between them they cover velocity, noise and
v-prediction, a flow from t = 1, discrete times, guidance with a class for every sample, networks
with and without a module to tap, vectors and images.

    python -m dlms_engine.lab.grounds FOLDER        # trains what is missing, about a minute each
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ..models.denoiser import Denoiser, NetworkPrediction
from ..processes import Process, RectifiedFlow, VPDiscrete
from ..support.files import replacing
from ..support.optimiser import optimiser_step

CLASSES = 4
_LEVELS = 1000


@dataclass(frozen=True)
class Ground:
    """One model.

    Attributes:
        shape: of a sample.
        prediction, process: as for ``Denoiser``.
        classes: number of classes; with them the model is guided.
        guidance: scale.
        features: tapped module, or None.
    """

    name: str
    shape: tuple[int, ...]
    prediction: NetworkPrediction
    process: Callable[[], Process]
    classes: int = 0
    guidance: float | None = None
    features: str | None = None


def linear_levels() -> VPDiscrete:
    """The usual linear schedule of a thousand levels (Ho et al. 2020)."""
    return VPDiscrete(betas=torch.linspace(1e-4, 0.02, _LEVELS, dtype=torch.float64))


GROUNDS = {
    ground.name: ground
    for ground in (
        Ground("flow-2d", (2,), "flow", RectifiedFlow),
        Ground("flow-8x8", (1, 8, 8), "flow", RectifiedFlow),
        Ground("vp-8x8", (1, 8, 8), "noise", linear_levels, features="middle"),
        Ground("v-8x8", (1, 8, 8), "velocity", linear_levels),
        Ground("guided-8x8", (1, 8, 8), "noise", linear_levels, classes=CLASSES, guidance=2.0),
    )
}


class Plane(nn.Module):
    """Three hidden layers of 128 on the point and sines and cosines of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
            nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``[B, 2]``, ``[B]`` -> ``[B, 2]``."""
        out: Tensor = self.layers(torch.cat([x, waves(time, 16).to(x.dtype)], dim=1))
        return out


class Pixels(nn.Module):
    """A two-level convolutional network for 8x8 images; ``middle`` works at 4x4.

    Args:
        scale: the time argument is multiplied by it (1/1000 for indices).
        classes: labels 0 .. classes - 1; ``classes`` itself means none. 0 for no labels.
    """

    def __init__(self, scale: float, classes: int = 0, width: int = 16) -> None:
        super().__init__()
        self.scale = scale
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes + 1, width) if classes else None
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``[B, 1, 8, 8]``, ``[B]``, int64 ``[B]`` -> ``[B, 1, 8, 8]``."""
        inside = self.time(waves(time * self.scale, 16).to(x.dtype))
        if self.labels is not None:
            assert label is not None
            inside = inside + self.labels(label)
        inside = inside[:, :, None, None]
        high = functional.silu(self.first(x) + inside)
        low = functional.silu(self.down(functional.avg_pool2d(high, 2)) + inside)
        low = low + functional.silu(self.middle(low))
        low = functional.interpolate(low, scale_factor=2.0)
        out: Tensor = self.last(functional.silu(self.up(torch.cat([high, low], 1)) + inside))
        return out


def waves(time: Tensor, channels: int) -> Tensor:
    """``[B]`` times in [0, 1] -> ``[B, channels]``."""
    rates = math.pi * 2.0 ** torch.arange(channels // 2, device=time.device)
    angles = time[:, None] * rates / 2
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def plane_data(count: int, generator: torch.Generator) -> Tensor:
    """``[count, 2]``: five arms of a pinwheel, standard deviation about 0.7."""
    arm = torch.randint(5, (count,), generator=generator)
    along = 0.3 * torch.randn(count, generator=generator) + 1
    across = 0.05 * torch.randn(count, generator=generator)
    angle = arm * (2 * math.pi / 5) + 0.25 * torch.exp(along)
    return torch.stack(
        [along * angle.cos() - across * angle.sin(), along * angle.sin() + across * angle.cos()], 1
    )


def pixel_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``[count, 1, 8, 8]`` in [-1, 1] and their classes: bars two ways, blobs, corners."""
    label = torch.randint(CLASSES, (count,), generator=generator)
    place = torch.rand(count, 2, generator=generator) * 5 + 1
    width = torch.rand(count, generator=generator) + 0.6
    rows = torch.arange(8.0)
    near = torch.exp(-(((rows - place[:, :, None]) / width[:, None, None]) ** 2))
    vertical, horizontal = (
        near[:, 0, None, :].expand(-1, 8, 8),
        near[:, 1, :, None].expand(-1, 8, 8),
    )
    blob = vertical * horizontal
    corner = torch.maximum(vertical, horizontal)
    every = torch.stack([vertical, horizontal, blob, corner], 1)
    chosen = every[torch.arange(count), label]
    return (2 * chosen - 1)[:, None], label


def network(ground: Ground) -> nn.Module:
    """The untrained network of ``ground``, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if len(ground.shape) == 1:
            return Plane()
        indexed = isinstance(ground.process(), VPDiscrete)
        return Pixels(1 / _LEVELS if indexed else 1.0, ground.classes)


def train_ground(ground: Ground, *, steps: int = 1500, batch: int = 128) -> nn.Module:
    """Trains on the model's own prediction, with a tenth of the labels left out."""
    model, process = network(ground), ground.process()
    generator = torch.Generator().manual_seed(11)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    averaged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) + 1e-5
        conditions: dict[str, Any] = {}
        if len(ground.shape) == 1:
            data = plane_data(batch, generator)
        else:
            data, label = pixel_data(batch, generator)
            if ground.classes:
                hidden = torch.rand(batch, generator=generator) < 0.1
                conditions["label"] = torch.where(hidden, ground.classes, label)
        noise = torch.randn(data.shape, generator=generator)
        span = process.t_max - process.t_min
        t = process.t_min + span * torch.rand(batch, generator=generator, dtype=torch.float64)
        alpha, sigma = (
            v.float().reshape(-1, *([1] * (data.ndim - 1)))
            for v in (process.alpha(t), process.sigma(t))
        )
        wanted = {
            "flow": noise - data,
            "noise": noise,
            "velocity": alpha * noise - sigma * data,
        }[ground.prediction]
        timestep = getattr(process, "timestep", None)
        time = t if timestep is None else timestep(t)
        out = model(alpha * data + sigma * noise, time.float(), **conditions)
        loss = (out - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser_step(optimiser)
        with torch.no_grad():
            for key, value in model.state_dict().items():
                averaged[key].lerp_(value, 0.01 if step > 200 else 1.0)
    model.load_state_dict(averaged)
    return model.eval().requires_grad_(False)


def flow_8x8() -> tuple[Denoiser, tuple[int, ...]]:
    """``--model dlms_engine.lab.grounds:flow_8x8``, kept in the folder ``models``."""
    return load_ground("flow-8x8", Path("models"))[:2]


def vp_8x8() -> tuple[Denoiser, tuple[int, ...]]:
    """``--model dlms_engine.lab.grounds:vp_8x8``, kept in the folder ``models``."""
    return load_ground("vp-8x8", Path("models"))[:2]


def load_ground(name: str, folder: Path) -> tuple[Denoiser, tuple[int, ...], dict[str, Any]]:
    """(denoiser, shape of a sample, conditions); trained first if ``folder`` does not hold it.

    Raises:
        ValueError: no such model.
    """
    if name not in GROUNDS:
        raise ValueError(f"ground is {name!r}, expected one of {sorted(GROUNDS)}")
    ground = GROUNDS[name]
    path = folder / f"{name}.safetensors"
    if path.exists():
        model = network(ground)
        model.load_state_dict(load_file(path))
        model.eval().requires_grad_(False)
    else:
        model = train_ground(ground)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(model.state_dict(), partial)
    conditions: dict[str, Any] = {}
    unconditional = None
    if ground.classes:
        conditions["label"] = torch.arange(ground.classes)
        unconditional = {"label": torch.tensor([ground.classes])}
    denoiser = Denoiser(
        model,
        ground.process(),
        ground.prediction,
        features=ground.features,
        guidance_scale=ground.guidance,
        unconditional=unconditional,
    )
    return denoiser, ground.shape, conditions


if __name__ == "__main__":
    for each in GROUNDS:
        load_ground(each, Path(sys.argv[1]))
        print(each)
