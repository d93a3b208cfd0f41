"""The analytic mixture with a bottleneck, and the reference values of AMED."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dlms_engine.engine.sampler import Sampler
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor, Choice
from dlms_engine.processes import EDM, Process

DATA = Path(__file__).parent / "data" / "amed.npz"
SUFFIX = "__both__poly7__N4__afs0"
KINDS: dict[str, Literal["data", "noise"]] = {"x0": "data", "eps": "noise"}
CASES: dict[str, AmedBase] = {
    "amed": AmedBase("amed"),
    "euler": AmedBase("ddim"),
    "dpm2": AmedBase("dpm_solver_2"),
    **{f"ipndm_o{p}": AmedBase("ipndm", p) for p in (2, 3, 4)},
    **{
        f"dpmpp_{p}m_{kind}_lof{int(low)}": AmedBase("dpm_solver_pp", p, prediction, low)
        for p in (2, 3)
        for kind, prediction in KINDS.items()
        for low in (True, False)
    },
}


class FeatureMap(nn.Module):
    """The fixed map of the reference: [B, 16] -> [B, 6, 8, 8]."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        i = torch.arange(8)[:, None]
        j = torch.arange(8)[None, :]
        channel = torch.arange(1, 7, dtype=x.dtype)[:, None, None]
        scaled = x / torch.sqrt(1 + sigma.to(x.dtype) ** 2)[:, None]
        waves = 0.7 * channel * scaled[:, (8 * i + j) % 16][:, None]
        return torch.sin(waves + 0.1 * (i - j).to(x.dtype))


class MixtureNetwork(nn.Module):
    """Exact E[x0 | x] of five Gaussians in 16 dimensions; counts its calls."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.bottleneck = FeatureMap()
        self.process = process
        self.means = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 16)) * 1.5)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        alpha, sigma = (f(t)[:, None].to(x.dtype) for f in (self.process.alpha, self.process.sigma))
        means = alpha[..., None] * self.means.to(x.dtype)
        self.bottleneck(x, sigma[:, 0])
        var = 0.09 * alpha**2 + sigma**2
        w = torch.softmax(-((x[:, None] - means) ** 2).sum(-1) / (2 * var), -1)
        return ((w @ self.means.to(x.dtype)) * sigma**2 + x * alpha * 0.09) / var


def problem(process: Process | None = None) -> tuple[MixtureNetwork, Denoiser]:
    process = process or EDM()
    network = MixtureNetwork(process)
    return network, Denoiser(network, process, "data", features="bottleneck")


def start_noise() -> Tensor:
    """Unit noise ``[8, 16]`` of the reference."""
    return torch.from_numpy(np.random.default_rng(1).normal(size=(8, 16)))


def reference(key: str) -> Tensor:
    with np.load(DATA) as file:
        return torch.from_numpy(file[key])


def reference_predictor() -> AmedPredictor:
    with np.load(DATA) as file:
        held = {
            k.split("/")[1]: torch.from_numpy(file[k])
            for k in file.files
            if k.startswith("predictor_both/") and "/io_" not in k
        }
    predictor = AmedPredictor(64, scale_dir=0.01, scale_time=0.2).double()
    predictor.load_state_dict(held)
    return predictor


class Given(AmedPredictor):
    """Says what it is told, ``[steps, B]`` each, step by step."""

    def __init__(self, r: Tensor, scale_dir: Tensor, scale_time: Tensor) -> None:
        super().__init__(64)
        self.said = [Choice(*c) for c in zip(r, scale_dir, scale_time, strict=True)]
        self.seen: list[Tensor | None] = []

    def forward(self, features: Tensor | None, level: Tensor, level_next: Tensor) -> Choice:
        self.seen.append(features)
        return self.said[(len(self.seen) - 1) % len(self.said)]


def random_choices(steps: int, batch: int, *, neutral: bool) -> Given:
    """r in (0.2, 0.8); scales 1 when ``neutral``, else within 10 and 20 percent."""
    generator = torch.Generator().manual_seed(steps * 100 + batch)
    u = torch.rand(3, steps, batch, dtype=torch.float64, generator=generator)
    one = torch.ones_like(u[0])
    if neutral:
        return Given(0.2 + 0.6 * u[0], one, one)
    return Given(0.2 + 0.6 * u[0], 0.9 + 0.2 * u[1], 0.8 + 0.4 * u[2])


def run(denoiser: Denoiser, policy: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, states) in float64."""
    out = Sampler(denoiser, policy, dtype=torch.float64)(x, return_trajectory=True)
    assert isinstance(out, tuple)
    return out
