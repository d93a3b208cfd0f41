"""Distilling a solver for a pipeline, and running it there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine import grids, processes, solvers  # noqa: E402
from dlms_engine.engine.sampler import Sampler  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines.distill import distill_pipeline, pipeline_denoiser  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"height": 16, "width": 16}
TINY = {
    "trajectories": 4,
    "batch": 2,
    "validation_samples": 2,
    "validation_steps": 4,
    "validate_every": 0,
    "progress": False,
    "method": "dlms",
}
CASES: dict[str, Any] = {
    "sd": (tiny.sd, lambda n: {**tiny.sd_inputs(n), **SIZE}),
    "sdxl": (tiny.sdxl, lambda n: {**tiny.sdxl_inputs(n), **SIZE}),
    "sd3": (tiny.sd3, tiny.sd3_inputs),
    "flux": (lambda: tiny.flux(use_dynamic_shifting=False), tiny.flux_inputs),
    "unconditional": (
        lambda: tiny.unconditional("DDPM"),
        lambda n: {"batch_size": n, "output_type": "np"},
    ),
}


def without(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("generator", "guidance_scale")}


@pytest.mark.parametrize("case", CASES)
def test_denoiser_is_the_pipelines_network_with_its_prompts(case: str) -> None:
    """The engine's sampler on it gives the pipeline's own latents, prompt by prompt."""
    make, inputs = CASES[case]
    pipe = make()
    guidance = {} if case == "unconditional" else {"guidance_scale": tiny.GUIDANCE}
    denoiser, shape = pipeline_denoiser(pipe, **without(inputs(2)), **guidance)
    scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")
    # FLUX pipelines choose the levels themselves
    levels = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if case == "flux" else {"num_inference_steps": 4}
    scheduler.set_timesteps(**levels)
    grid = scheduler._runner._times.grid
    table = solvers.unipc(denoiser.process, grid, order=2)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    found = Sampler(denoiser, table)(noise)
    if case == "unconditional":
        x = noise
        for t in scheduler.timesteps:
            with torch.no_grad():
                out = pipe.unet(x, t).sample
            x = scheduler.step(out, t, x, return_dict=False)[0]
        torch.testing.assert_close(found, x, rtol=0, atol=1e-4)
        return
    pipe.scheduler = scheduler
    steps: dict[str, Any] = {"num_inference_steps": 4}
    asked = {**inputs(2), **steps, "latents": noise}
    expected = pipe(**asked).images
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
    swapped = {k: v.flip(0) if k == "prompt_embeds" else v for k, v in asked.items()}
    assert (found - pipe(**swapped).images).abs().max() > 1e-4  # the prompts do matter


@pytest.mark.parametrize("case", ["sd", "sd3", "unconditional"])
def test_distilled_solver_runs_in_its_pipeline(case: str, tmp_path: Any) -> None:
    make, inputs = CASES[case]
    pipe = make()
    scheduler = distill_pipeline(
        pipe,
        nfe=2,
        guidance_scale=None if case == "unconditional" else tiny.GUIDANCE,
        pipeline_arguments=without(inputs(2)),
        afs=False,
        **TINY,
    )
    assert scheduler.solver.nfe == 2
    scheduler.save_pretrained(tmp_path)
    images = []
    for run in (scheduler, DLMSScheduler.from_pretrained(tmp_path)):
        pipe.scheduler = run
        asked = {**inputs(1), "generator": torch.Generator().manual_seed(3)}
        images.append(torch.as_tensor(pipe(**asked, num_inference_steps=2).images))
    assert torch.equal(*images) and bool(images[0].isfinite().all())


def test_a_directory_and_a_prompt_file(tmp_path: Any) -> None:
    """Nothing is downloaded; an empty prompt file and a missing directory are named."""
    pipe = tiny.unconditional("DDPM")
    pipe.save_pretrained(tmp_path / "model")
    scheduler = distill_pipeline(
        tmp_path / "model", nfe=2, afs=True, pipeline_arguments={"batch_size": 1}, **TINY
    )
    accelerate(pipe, solver=scheduler.solver)
    out = pipe(num_inference_steps=2, output_type="np").images
    assert bool(torch.as_tensor(out).isfinite().all())
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="prompts are empty"):
        distill_pipeline(pipe, tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="not a directory"):
        distill_pipeline(str(tmp_path / "missing"))


def test_a_pipeline_with_a_learned_solver_is_distilled_again() -> None:
    """A second distillation, of another count, ended in an error about the first one's file."""
    pipe = tiny.sd()
    asked = without(CASES["sd"][1](1))
    before, shape = pipeline_denoiser(pipe, **asked)
    table = solvers.ddim(before.process, grids.time_uniform(before.process, 3))
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=table)
    assert pipe.scheduler.config.solver == "dlms_solver.safetensors"
    again, same = pipeline_denoiser(pipe, **asked)
    assert same == shape and again.process.config() == before.process.config()


def test_same_process_as_the_scheduler() -> None:
    """A table on the denoiser's process fits the pipeline's scheduler; on another it is refused."""
    pipe = tiny.sd()
    denoiser, _ = pipeline_denoiser(pipe, **without(CASES["sd"][1](1)))
    own = denoiser.process
    other = processes.VPDiscrete(alphas_cumprod=pipe.scheduler.alphas_cumprod**0.9)

    def scheduled(process: processes.Process) -> None:
        table = solvers.ddim(process, grids.time_uniform(process, 3))
        DLMSScheduler.from_config(pipe.scheduler.config, solver=table).set_timesteps(3)

    scheduled(own)
    with pytest.raises(ValueError, match="the solver was made for"):
        scheduled(other)
