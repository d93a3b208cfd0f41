"""Distilling for pipelines that call their network once per guidance branch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
import cells
import videos
from tiny_pipelines import embeddings

from dlms_engine import solvers
from dlms_engine.cli.outcome import start_value
from dlms_engine.engine.sampler import Sampler
from dlms_engine.integrations.diffusers import DLMSScheduler
from dlms_engine.integrations.pipelines import denoiser as pipeline_denoisers
from dlms_engine.integrations.pipelines.distill import distill_pipeline, pipeline_denoiser
from dlms_engine.integrations.pipelines.prompt_network import PipelineNetwork

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"height": 16, "width": 16, "num_frames": 5}
GUIDANCE = 3.5


def given(prompts: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(prompts, 7, 32, seed=1),
        "negative_prompt_embeds": embeddings(prompts, 7, 32, seed=2),
        **SIZE,
    }


def both(prompts: int, make: Any = videos.wan, **extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's latents, and those of the engine's sampler on the pipeline's denoiser."""
    pipe, asked = make(), {**given(prompts), "guidance_scale": GUIDANCE, **extra}
    denoiser, shape = pipeline_denoiser(pipe, **asked)
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")
    noise = torch.randn(prompts, *shape, generator=torch.Generator().manual_seed(5))
    asked = {**asked, "latents": noise, "num_inference_steps": 4}
    expected = pipe(**asked, output_type="latent").frames
    grid = pipe.scheduler._runner._times.grid
    table = solvers.unipc(denoiser.process, grid, order=2)
    return expected, Sampler(denoiser, table)(noise)


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_both_branches_are_told_apart_by_what_the_pipeline_does(prompts: int) -> None:
    """With four prompts the first two were taken for the unconditional branch; five and one failed."""
    expected, found = both(prompts)
    assert (expected - found).abs().max() < 2e-5 * expected.abs().max()


def test_a_branch_that_is_left_out_is_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    honest = PipelineNetwork._side
    monkeypatch.setattr(
        PipelineNetwork, "_side", lambda self, calls, *rest: honest(self, calls[:1], *rest)
    )
    with pytest.raises(ValueError, match="something else than its networks' output"):
        both(2)


TWO: dict[str, dict[str, Any]] = {
    "one scale": {},
    "two scales": {"guidance_scale_2": 2.0},
    "unguided": {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("scales", TWO)
def test_two_networks_are_one(scales: str) -> None:
    """Wan 2.2: refused with guidance; without, the first network was taken for all times."""
    expected, found = both(2, videos.wan_two, **TWO[scales])
    assert (expected - found).abs().max() < 2e-5 * expected.abs().max()


def test_experts_the_wrong_way_round_are_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    honest = PipelineNetwork._side
    other = {0: range(2, 4), 2: range(2)}
    monkeypatch.setattr(
        PipelineNetwork, "_side", lambda self, k, *rest: honest(self, other[k[0]], *rest)
    )
    with pytest.raises(ValueError, match="something else than its networks' output"):
        both(2, videos.wan_two)


def test_samples_on_both_sides_of_the_boundary() -> None:
    """One batch, each sample at its own time: the expert of that time, and its prompt."""
    denoiser, shape = pipeline_denoiser(videos.wan_two(), **given(3), guidance_scale=GUIDANCE)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(5))
    times = torch.tensor([0.95, 0.2, 0.875, 0.8, 0.99], dtype=torch.float64)
    together = denoiser.predict(x, times)
    for n in range(5):
        denoiser.first_sample(n)
        alone = denoiser.predict(x[n : n + 1], times[n])
        assert torch.allclose(alone, together[n : n + 1], rtol=0, atol=1e-5)


def test_a_network_that_is_not_used_is_said() -> None:
    pipe = videos.wan_two()
    pipe.register_to_config(boundary_ratio=1.1)
    with pytest.raises(ValueError, match="one of its networks is not used"):
        pipeline_denoiser(pipe, **given(1), guidance_scale=GUIDANCE)


def test_training_with_two_networks_keeps_or_improves(tmp_path: Path) -> None:
    """Untrained it is the handcrafted solver; the file says both networks' scales and the switch."""
    settings = {"trajectories": 6, "batch": 2, "validation_samples": 2, "validation_steps": 8,
                "progress": False, "method": "dlms", "nfe": 3}  # fmt: skip
    asked = {**given(2), "guidance_scale_2": 2.0}
    pipe = videos.wan_two()
    scheduler = distill_pipeline(
        pipe, guidance_scale=GUIDANCE, pipeline_arguments=asked, **settings
    )
    solver = scheduler.solver
    assert solver.best["score"] <= start_value("dlms", solver.history)
    origin = solver.settings["pipeline"]
    assert (origin["guidance_scale"], origin["guidance_scale_2"]) == (GUIDANCE, 2.0)
    assert origin["boundary"] == 0.875
    pipe.scheduler = scheduler
    run = {**asked, "guidance_scale": GUIDANCE, "num_inference_steps": 3, "output_type": "latent"}
    assert bool(pipe(**run).frames.isfinite().all())


ELSEWHERE = {
    "DiTPipeline": "not a linear mix of the network's outputs",
    "CogView4Pipeline": "argument timestep of transformer follows the steps otherwise",
    "Lumina2Pipeline, truncated guidance": "other network calls in other steps",
    "StableDiffusionControlNetPipeline": "residuals.0 of unet does not only follow the step",
    "StableDiffusionPipeline, rescaled": "depends on their values",
    "StableDiffusionPipeline, DeepCache": "forward of mid_block was replaced",
    "StableDiffusionPAGPipeline": "something else than its networks' output",
    "StableDiffusionInpaintPipeline": "changes the latents between two steps",
    "FluxPipeline, FirstBlockCache": "a cache is enabled",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_pipelines_that_do_more_than_guidance_are_refused(name: str) -> None:
    """Guidance of a class was dropped, residuals were the first step's: another model."""
    make, inputs = cells.CASES[name]
    asked = {k: v for k, v in inputs().items() if k not in ("generator", "output_type")}
    with pytest.raises(ValueError, match=ELSEWHERE[name]) as found:
        pipeline_denoiser(make(), **asked)
    assert 'from_config(pipe.scheduler.config, solver="unipc")' in str(found.value)


def test_without_the_proof_they_are_taken(monkeypatch: Any) -> None:
    """Planted fault."""
    monkeypatch.setattr(pipeline_denoisers, "proved", lambda *_: None)
    make, inputs = cells.CASES["StableDiffusionPAGPipeline"]
    asked = {k: v for k, v in inputs().items() if k not in ("generator", "output_type")}
    pipeline_denoiser(make(), **asked)
