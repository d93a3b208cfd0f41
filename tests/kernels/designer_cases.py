"""Designers, denoisers and comparisons shared by the tests of the designer's row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cli_model import TinyNetwork
from torch import Tensor

from dlms_engine import grids, processes
from dlms_engine.engine.dlms_steps import DesignerSteps, policy_steps
from dlms_engine.engine.sampler import Sampler
from dlms_engine.engine.steps import PolicySteps
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

EDM = processes.EDM()
DISCRETE = processes.VPDiscrete(betas=torch.linspace(1e-4, 0.02, 100))


class Given(Denoiser):
    """A denoiser whose bottleneck is given."""

    given: Tensor | None = None

    @property
    def last_features(self) -> Tensor:
        assert self.given is not None
        return self.given


def make_policy(process: processes.Process = EDM, **options) -> DesignerPolicy:
    """A designer with every parameter random, so that everything matters."""
    settings = DesignerSettings(
        **{"steps": 4, "order": 3, "afs": True, "features": 64, "prediction": "data", **options}
    )
    n, p = settings.steps, settings.order
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(n, p, dtype=torch.float64)
    for i in range(n):
        given = torch.randn(min(i + 1, p), generator=generator, dtype=torch.float64) * 0.3
        weights[i, : len(given)] = given + (1 - given.sum()) / len(given)
    linear = settings.coordinate == "linear"
    grid = grids.time_uniform(process, n) if linear else grids.logsnr(process, n)
    made = Designer(settings, process, grid, weights).double().requires_grad_(False)
    for parameter in made.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values / parameter.shape[-1] ** 0.5)
    return DesignerPolicy(made)


def make_denoiser(process: processes.Process, prediction: str, features: bool = True) -> Given:
    held = Given(TinyNetwork(), process, prediction, guidance_scale=1.7, unconditional={"y": 0})
    held.features = "given" if features else None
    return held


def bottlenecks(batch: int, count: int, length: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(17, count, length, generator=generator, dtype=torch.float64)
    return whole[:batch].transpose(0, 1).contiguous()


def run(steps, denoiser: Given, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(row, c_noise of the next evaluation) of every evaluation, first c_in and first c_noise."""
    batch = features.shape[1]
    yield steps.c_in.expand(batch)[:, None], level(steps).expand(batch)
    for n in range(steps.count):
        denoiser.given = features[n]
        yield steps.row(n), level(steps)


def level(steps) -> Tensor:
    return steps._pre.c_noise if isinstance(steps, PolicySteps) else steps._c_noise


@torch.no_grad()
def both(device: str, policy: DesignerPolicy, denoiser: Given, batch: int = 3):
    """What the torch operations and what the kernel say, float64."""
    x = torch.zeros(batch, 1, dtype=torch.float64, device=device)
    policy.designer.to(device)
    denoiser.to(device)
    length = policy.designer.settings.features or 64
    features = bottlenecks(batch, policy.nfe, length).to(device)
    found = {}
    for backend, kind in (("eager", PolicySteps), ("triton", DesignerSteps)):
        steps = policy_steps(denoiser, policy, x, torch.float64, {}, backend)
        assert type(steps) is kind
        found[backend] = list(run(steps, denoiser, features))
    return found["eager"], found["triton"]


def check(device: str, policy: DesignerPolicy, denoiser: Given, batch: int = 3) -> None:
    want, got = both(device, policy, denoiser, batch)
    assert len(want) == len(got) == policy.nfe + 1
    for n, ((row, noise), (expected, level)) in enumerate(zip(got, want, strict=True)):
        assert row.shape == expected.shape and row.dtype == torch.float64
        torch.testing.assert_close(
            row, expected, rtol=1e-12, atol=1e-13, msg=lambda m, n=n: f"{n} {m}"
        )
        if n < policy.nfe:  # no evaluation follows the last row
            torch.testing.assert_close(noise, level, rtol=1e-12, atol=1e-13)


def sampler(device: str, backend: str, policy: DesignerPolicy, dtype=torch.float64) -> Sampler:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyNetwork().to(dtype).eval().requires_grad_(False)
    denoiser = Denoiser(network, policy.process, "edm", features="mid_block")
    return Sampler(denoiser, policy, backend=backend, dtype=dtype).to(device)
