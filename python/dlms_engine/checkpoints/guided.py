"""guided-diffusion (ADM) networks as denoisers: noise schedules and classifier guidance.

``checkpoints.load.load_checkpoint`` reads the files. The EDM networks of the
consistency-model repository are the same U-Net under another noise process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.denoiser import Denoiser, NetworkPrediction
from ..processes import EDM, Process, VPDiscrete

SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class Noise:
    """What a checkpoint was trained on.

    Attributes:
        kind: "ddpm" (a table of betas, network predicts noise) or "edm" (Karras et al. 2022; the
            network is called with 250 ln(sigma)).
        noise_schedule: "linear" or "cosine", for ddpm.
        diffusion_steps: levels of the table.
        rescale_timesteps: times are scaled as if there were 1000.
        sigma_min, sigma_max, sigma_data: for edm.
    """

    kind: str = "ddpm"
    noise_schedule: str = "linear"
    diffusion_steps: int = 1000
    rescale_timesteps: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("ddpm", "edm"):
            raise ValueError(f"kind is {self.kind!r}, expected 'ddpm' or 'edm'")
        if self.noise_schedule not in SCHEDULES:
            raise ValueError(
                f"noise_schedule is {self.noise_schedule!r}, expected one of {', '.join(SCHEDULES)}"
            )

    def process(self) -> Process:
        """The noise process of the engine."""
        if self.kind == "edm":
            return EDM(self.sigma_min, self.sigma_max)
        return VPDiscrete(betas=ddpm_betas(self.noise_schedule, self.diffusion_steps))

    @property
    def prediction(self) -> NetworkPrediction:
        """What the network predicts."""
        return "edm" if self.kind == "edm" else "noise"

    def time_input(self, process: Process) -> Callable[[Tensor], Tensor]:
        """Process time -> what the network is called with."""
        if isinstance(process, VPDiscrete):
            return _Index(process, 1000.0 / self.diffusion_steps if self.rescale_timesteps else 1.0)
        return _LogLevel(process)


# Classes and no functions: a denoiser with one is copied and pickled.
@dataclass(frozen=True)
class _Index:
    """The index of a noise level, scaled."""

    process: VPDiscrete
    scale: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.process.timestep(t) * self.scale


@dataclass(frozen=True)
class _LogLevel:
    """250 ln(sigma)."""

    process: Process

    def __call__(self, t: Tensor) -> Tensor:
        return 250.0 * torch.log(self.process.sigma(t))


@dataclass(frozen=True)
class _SigmaOf:
    """sigma at the time that has an index."""

    index: _Index

    def __call__(self, time: Tensor) -> Tensor:
        process = self.index.process
        return process.sigma((time.double() / self.index.scale + 1) / process.levels)


def ddpm_betas(schedule: str, count: int) -> Tensor:
    """float64 ``[count]``: linear (Ho et al. 2020, for 1000 steps) or cosine (Nichol & Dhariwal)."""
    if schedule == "linear":
        scale = 1000 / count
        return torch.linspace(scale * 1e-4, scale * 0.02, count, dtype=torch.float64)
    t = torch.arange(count + 1, dtype=torch.float64) / count
    level = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


class NoisePart(nn.Module):
    """A network without the variance it may predict beside the noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, **conditions: Any) -> Tensor:
        out: Tensor = self.network(x, time, **conditions)
        return out[:, : x.shape[1]]


class ClassifierGuided(nn.Module):
    """noise - scale * sigma * d log p(class | x_t) / dx (Dhariwal & Nichol 2021, Algorithm 2).

    Args:
        network: ``(x, time, class_labels=...)`` -> noise ``[B, C, H, W]``.
        classifier: ``(x, time)`` -> log-odds ``[B, classes]``.
        sigma_of: the network's time ``[B]`` -> sigma(t) of the variance-preserving process.
        conditional: whether the network takes the labels too.
    """

    def __init__(
        self,
        network: nn.Module,
        classifier: nn.Module,
        scale: float,
        sigma_of: Callable[[Tensor], Tensor],
        conditional: bool,
    ) -> None:
        super().__init__()
        self.network, self.classifier = network, classifier
        self.scale, self.sigma_of, self.conditional = float(scale), sigma_of, conditional

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``class_labels`` ``[B]``: indices; the gradient is differentiable where ``x`` is."""
        if class_labels is None:
            raise ValueError("classifier guidance needs class_labels, indices [B]")
        noise: Tensor = (
            self.network(x, time, class_labels=class_labels)
            if self.conditional
            else self.network(x, time)
        )
        sigma = self.sigma_of(time).to(noise)[:, None, None, None]
        return noise - self.scale * sigma * self.gradient(x, time, class_labels).to(noise)

    def gradient(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Derivative of log p(labels | x) by x ``[B, C, H, W]``."""
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            asked = x if differentiable else x.detach().clone().requires_grad_(True)
            odds = self.classifier(asked, time if differentiable else time.detach().clone())
            # of every sample alone: the sum's gradient is the samples' gradients
            chosen = F.log_softmax(odds, dim=1).gather(1, labels.long().clone()[:, None])
            (found,) = torch.autograd.grad(chosen.sum(), asked, create_graph=differentiable)
        return found


def guided_denoiser(
    network: nn.Module,
    noise: Noise,
    *,
    classifier: nn.Module | None = None,
    classifier_scale: float = 1.0,
    features: str | None = None,
) -> Denoiser:
    """A denoiser of a ``GuidedUNet``; ``class_labels`` ``[B]`` where it or the guidance needs them.

    Raises:
        ValueError: classifier guidance of an EDM network (the classifiers know DDPM's noise).
    """
    process = noise.process()
    time_input = noise.time_input(process)
    asked: nn.Module = NoisePart(network)
    if classifier is not None:
        if not isinstance(process, VPDiscrete):
            raise ValueError("classifier guidance is for ddpm networks, this one is 'edm'")
        conditional = getattr(network, "num_classes", None) is not None
        asked = ClassifierGuided(
            asked,
            classifier,
            classifier_scale,
            _SigmaOf(cast(_Index, time_input)),
            conditional,
        )
    return Denoiser(
        asked,
        process,
        noise.prediction,
        sigma_data=noise.sigma_data,
        features=features,
        time_input=time_input,
    )
