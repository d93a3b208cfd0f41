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
import videos
from tiny_pipelines import embeddings

from dlms_engine import solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.integrations.diffusers import DLMSScheduler
from dlms_engine.integrations.pipelines import branch_calls
from dlms_engine.integrations.pipelines.distill import pipeline_denoiser

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"height": 16, "width": 16, "num_frames": 5}
GUIDANCE = 3.5


def given(prompts: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(prompts, 7, 32, seed=1),
        "negative_prompt_embeds": embeddings(prompts, 7, 32, seed=2),
        **SIZE,
    }


def both(prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's latents, and those of the engine's sampler on the pipeline's denoiser."""
    pipe = videos.wan()
    denoiser, shape = pipeline_denoiser(pipe, **given(prompts), guidance_scale=GUIDANCE)
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")
    noise = torch.randn(prompts, *shape, generator=torch.Generator().manual_seed(5))
    asked = {**given(prompts), "latents": noise, "guidance_scale": GUIDANCE}
    expected = pipe(**asked, num_inference_steps=4, output_type="latent").frames
    grid = pipe.scheduler._runner._times.grid
    table = solvers.unipc(denoiser.process, grid, order=2)
    return expected, Sampler(denoiser, table)(noise)


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_both_branches_are_told_apart_by_what_the_pipeline_does(prompts: int) -> None:
    """With four prompts the first two were taken for the unconditional branch; five and one failed."""
    expected, found = both(prompts)
    assert (expected - found).abs().max() < 2e-5 * expected.abs().max()


def test_branches_the_wrong_way_round_are_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    joined = branch_calls._joined
    monkeypatch.setattr(
        branch_calls, "_joined", lambda name, records, prompts: joined(name, records[::-1], prompts)
    )
    expected, found = both(2)
    assert (expected - found).abs().max() > 1e-2 * expected.abs().max()


def test_two_networks_are_refused() -> None:
    pipe = videos.wan_two()
    with pytest.raises(ValueError, match="other networks in other steps"):
        pipeline_denoiser(pipe, **given(2), guidance_scale=GUIDANCE)
