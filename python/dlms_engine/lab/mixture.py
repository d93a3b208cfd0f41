"""Networks with an exact answer: posterior means of a Gaussian mixture, with a tapped feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.denoiser import Denoiser, per_sample
from ..processes import EDM, VP, Cosine, Process, RectifiedFlow

MIXTURE_SHAPE = (16,)
_COMPONENTS, _STD, _FEATURES = 5, 0.6, 64
_PREDICTIONS = {
    "edm": "data",
    "vp": "noise",
    "cosine": "velocity",
    "rectified_flow": "flow",
}
"""Process -> what its network returns."""


class Mixture(nn.Module):
    """The network of data in five equal components N(mu_i, 0.36), float64.

    The module ``tap`` sees 64 numbers a sample, waves of the scaled input.
    """

    means: Tensor

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        generator = torch.Generator().manual_seed(0)
        means = 0.8 * torch.randn(
            _COMPONENTS, *MIXTURE_SHAPE, generator=generator, dtype=torch.float64
        )
        self.register_buffer("means", means)
        self.tap = nn.Identity()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``[B, 16]`` and times ``[B]`` -> the process's usual prediction."""
        process = self.process
        alpha, sigma = (per_sample(v, x) for v in (process.alpha(t), process.sigma(t)))
        unit = x / (alpha**2 + sigma**2).sqrt()
        self.tap(torch.sin(unit.repeat(1, _FEATURES // MIXTURE_SHAPE[0])).reshape(-1, 1, 8, 8))
        variance = alpha**2 * _STD**2 + sigma**2
        distance = (x[:, None] - alpha[:, None] * self.means).square().sum(-1)
        mean = torch.softmax(-distance / (2 * variance), dim=-1) @ self.means
        # the noise and the velocity without dividing by sigma or alpha
        pull = (x - alpha * mean) / variance
        data, noise = mean + alpha * _STD**2 * pull, sigma * pull
        kind = _PREDICTIONS[process.name]
        found = {"data": data, "noise": noise, "flow": noise - data}
        found["velocity"] = alpha * noise - sigma * data
        return found[kind] * self.scale


def mixture_model(process: Process) -> Denoiser:
    """The mixture on ``process``, its bottleneck tapped."""
    prediction = _PREDICTIONS[process.name]
    made = Denoiser(Mixture(process), process, prediction, features="tap")  # type: ignore[arg-type]
    return made.requires_grad_(False)


MIXTURES: dict[str, Process] = {
    "EDM": EDM(),
    "VP": VP(),
    "cosine": Cosine(),
    "flow": RectifiedFlow(),
}
