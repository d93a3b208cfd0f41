"""A learned solver with correctors gives in a pipeline what the engine's sampler gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine import save, solvers  # noqa: E402
from dlms_engine.engine.sampler import Sampler  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.k_diffusion import get_sigmas_dlms, sample_dlms  # noqa: E402
from dlms_engine.integrations.pipelines.distill import pipeline_denoiser  # noqa: E402
from dlms_engine.integrations.scheduler import state  # noqa: E402
from dlms_engine.policies.corrector import (  # noqa: E402
    CorrectedPolicy,
    Corrector,
    Correctors,
    CorrectorSettings,
)

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
CASES: dict[str, Any] = {
    "sd": (tiny.sd, lambda n: {**tiny.sd_inputs(n), "height": 16, "width": 16}),
    "sd3": (tiny.sd3, tiny.sd3_inputs),
}


def solver(pipe: Any, denoiser: Any, shape: tuple[int, ...]) -> CorrectedPolicy:
    """Three rows of four corrected, by enough to be seen."""
    scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="dpm_solver_pp")
    scheduler.set_timesteps(STEPS)
    table = solvers.dpm_solver_pp(denoiser.process, scheduler._runner._times.grid, order=2)
    torch.manual_seed(0)
    parts = []
    for n in range(1, STEPS):
        part = Corrector(CorrectorSettings("image", shape[0], min(n + 1, 2), width=8))
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        parts.append(part)
    return CorrectedPolicy(table, parts)


def three_ways(case: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The sampler's latents, the scheduler's, and those of an accelerated pipeline's calls."""
    make, inputs = CASES[case]
    pipe = make()
    asked = {k: v for k, v in inputs(2).items() if k not in ("generator", "guidance_scale")}
    denoiser, shape = pipeline_denoiser(pipe, **asked, guidance_scale=tiny.GUIDANCE)
    policy = solver(pipe, denoiser, shape)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    call = {**asked, "guidance_scale": tiny.GUIDANCE, "latents": noise}
    call |= {"num_inference_steps": STEPS, "output_type": "latent"}
    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver=policy)
    stepped = pipe(**call).images
    pipe.scheduler = original
    acceleration = accelerate(pipe, solver=policy)
    accelerated = [pipe(**call).images for _ in range(2)]
    assert acceleration.report().whole_loop, acceleration.report()
    return Sampler(denoiser, policy)(noise), stepped, accelerated


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_the_sampler(case: str) -> None:
    """The correctors were left out without a word: another solver ran."""
    expected, stepped, accelerated = three_ways(case)
    scale = expected.abs().max()
    for found in (stepped, *accelerated):
        assert (found - expected).abs().max() < 2e-4 * scale


def test_left_out_correctors_are_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    monkeypatch.setattr(state.State, "_corrected", lambda self, n, x, slots: x.clone())
    expected, stepped, _ = three_ways("sd3")
    assert (stepped - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_late_start_says_that_it_leaves_them_out(caplog: Any, tmp_path: Path) -> None:
    pipe = tiny.sd("Img2Img")
    denoiser, shape = pipeline_denoiser(
        tiny.sd(), **{k: v for k, v in tiny.sd_inputs(1).items() if k != "generator"}
    )
    save(tmp_path / "solver.safetensors", solver(pipe, denoiser, shape))
    pipe.scheduler = DLMSScheduler.from_config(
        pipe.scheduler.config, solver=tmp_path / "solver.safetensors"
    )
    asked = {**tiny.sd_inputs(1), "image": torch.rand(1, 3, 16, 16), "strength": 0.5}
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        pipe(**asked, num_inference_steps=STEPS)
    assert "correctors are left out" in caplog.text


@pytest.mark.parametrize("case", CASES)
def test_k_diffusion_runs_them_too(case: str) -> None:
    """Its states are divided by alpha where the process preserves variance."""
    make, inputs = CASES[case]
    asked = {k: v for k, v in inputs(2).items() if k != "generator"}
    pipe = make()
    denoiser, shape = pipeline_denoiser(pipe, **asked)
    policy, process = solver(pipe, denoiser, shape), denoiser.process
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    flow = case == "sd3"
    sigmas = get_sigmas_dlms(solver=policy)
    alpha, end = process.alpha(policy.grid[[0, -1]]).tolist()

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = sigma[0].double() if flow else process.inverse_sigma(sigma[0].double())
        return denoiser(x if flow else x * float(process.alpha(t)), t)

    found = sample_dlms(model, noise if flow else noise / alpha, sigmas, solver=policy, flow=flow)
    expected = Sampler(denoiser, policy)(noise)
    found = found if flow else found * end
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    rows = Sampler(denoiser, policy.rows)(noise)
    assert (rows - expected).abs().max() > 1e-1 * expected.abs().max()
    assert isinstance(policy.correctors, Correctors)
