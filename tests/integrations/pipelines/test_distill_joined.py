"""Distilling where the network is given more than the latents, or gives more than the scheduler takes."""

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

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.integrations.diffusers import DLMSScheduler
from dlms_engine.integrations.pipelines import step_calls
from dlms_engine.integrations.pipelines.distill import distill_pipeline, pipeline_denoiser
from dlms_engine.integrations.pipelines.forms import Packing, match
from dlms_engine.integrations.pipelines.step_calls import time_form
from dlms_engine.integrations.scheduler.origin import pipeline_facts
from dlms_engine.integrations.scheduler.runner import Runner
from dlms_engine.policies.distilled import DistilledSolver

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = (
    "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "WanImageToVideoPipeline",
    "WanImageToVideoPipeline, two networks", "LTXImageToVideoPipeline",
    "HunyuanVideoImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline, first frame",
    "CogVideoXImageToVideoPipeline", "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionInpaintPipeline, joined", "MarigoldDepthPipeline", "PixArtAlphaPipeline",
    "AuraFlowPipeline", "CogVideoXPipeline", "Lumina2Pipeline", "ZImagePipeline", "IFPipeline",
    "MochiPipeline", "StableDiffusionXLModularPipeline", "LuminaPipeline",
    "StableVideoDiffusionPipeline",
)  # fmt: skip


class Noting(Runner):
    """A run that keeps where it starts and ends."""

    def advance(self, n: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if n == 0:
            self.start = sample
        self.end = super().advance(n, output, sample)
        return self.end


class Listener:
    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def runner(self, *arguments: Any) -> Runner:
        self.run = Noting(*arguments)
        return self.run


def difference(name: str, steps: int = 3) -> float:
    """A table in the pipeline, and in the engine's sampler on the pipeline's denoiser."""
    make, inputs = cells.CASES[name]
    pipe, asked = make(), inputs()
    denoiser, shape = pipeline_denoiser(
        pipe, **{k: v for k, v in asked.items() if k != "output_type"}
    )
    grid = grids.time_uniform(denoiser.process, steps)
    table = solvers.dpm_solver_pp(denoiser.process, grid, order=2)
    listener, call = Listener(), denoiser.network.call
    facts = pipeline_facts(pipe, shape, call.guidance, steps, call.guidance_2, call.own_times)
    solver = DistilledSolver(table, "free_table", {"pipeline": facts})
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=solver)
    pipe.scheduler.run_with(listener)
    # an image is encoded as it was before
    pipe(**{**asked, "generator": inputs().get("generator"), "num_inference_steps": steps})
    found = Sampler(denoiser, table)(listener.run.start.float())
    assert found.shape[1:] == shape
    return cells.relative(listener.run.end.float(), found)


@pytest.mark.parametrize("name", CASES)
def test_the_denoiser_is_what_the_pipeline_calls(name: str) -> None:
    """Joined channels and tokens, three branches and lists of latents were refused; a learned variance
    was, too, for other than four dimensions."""
    assert difference(name) < 5e-5


def test_a_joined_part_that_is_lost_is_seen(monkeypatch: Any) -> None:
    """Planted fault: zeros in the place of the image's channels."""
    build = Packing.build

    def blank(self: Packing, x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        return build(self, x, torch.zeros_like(whole))

    monkeypatch.setattr(Packing, "build", blank)
    with pytest.raises(ValueError, match="something else than its networks' output"):
        difference("WanImageToVideoPipeline")


@pytest.mark.parametrize("name", ["Lumina2Pipeline", "ZImagePipeline", "WanImageToVideoPipeline"])
def test_the_scale_is_the_one_that_was_given(name: str) -> None:
    """Lumina 2 hands over the negative of its mix: 2 was taken for its scale, 3."""
    make, inputs = cells.CASES[name]
    asked = {k: v for k, v in inputs().items() if k not in ("generator", "output_type")}
    assert pipeline_denoiser(make(), **asked)[0].network.call.guidance == 3.0


def test_one_weight_for_all_channels_is_seen(monkeypatch: Any) -> None:
    """Planted fault: Lumina guides three of its four channels."""
    honest = step_calls.NetworkCall.table
    monkeypatch.setattr(
        step_calls.NetworkCall, "table", lambda self: honest(self)[:, :1].expand(-1, self.slices)
    )
    with pytest.raises(ValueError, match="something else than its networks' output"):
        difference("LuminaPipeline")


def test_a_time_in_other_units_is_seen(monkeypatch: Any) -> None:
    """Planted fault: the negative of Lumina's time."""
    honest = step_calls.time_form
    monkeypatch.setattr(
        "dlms_engine.integrations.pipelines.program_calls.time_form",
        lambda *given: tuple(-part for part in honest(*given)),
    )
    with pytest.raises(ValueError, match="something else than its networks' output"):
        difference("Lumina2Pipeline")


def test_it_is_distilled_and_runs_there(tmp_path: Any) -> None:
    """Image-to-video with two networks: the file says both scales, the prompts' file is found again."""
    make, inputs = cells.CASES["WanImageToVideoPipeline, two networks"]
    pipe = make()
    asked = {k: v for k, v in inputs().items() if k not in ("generator", "output_type")}
    settings = {"trajectories": 4, "batch": 2, "validation_samples": 2, "validation_steps": 4,
                "validate_every": 0, "progress": False, "method": "dlms", "nfe": 2}  # fmt: skip
    scheduler = distill_pipeline(
        pipe, pipeline_arguments=asked, folder=tmp_path / "cache", **settings
    )
    origin = scheduler.solver.settings["pipeline"]
    assert (origin["guidance_scale"], origin["guidance_scale_2"]) == (3.0, 2.0)
    noise = torch.randn(2, 16, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    made = pipeline_denoiser(pipe, **asked, folder=tmp_path / "other")[0](noise, 0.9)
    stamp = (tmp_path / "other" / "prompts-00000.safetensors").stat().st_mtime_ns
    again = pipeline_denoiser(pipe, **asked, folder=tmp_path / "other")[0](noise, 0.9)
    assert torch.equal(made, again)
    assert (tmp_path / "other" / "prompts-00000.safetensors").stat().st_mtime_ns == stamp
    pipe.scheduler = scheduler
    run = {**asked, "num_inference_steps": 2, "output_type": "latent"}
    assert bool(pipe(**run).frames.isfinite().all())


@pytest.mark.parametrize("first", [0, 1])
def test_tokens_of_a_video_beside_others(first: int) -> None:
    """LTX's image-to-video steps all frames but the first, in tokens of all of them."""
    x = torch.randn(2, 5, 3, 4, 2, generator=torch.Generator().manual_seed(3))
    tokens = x.permute(0, 2, 3, 4, 1).reshape(2, 24, 5)
    image = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(4))
    whole = torch.cat([image, tokens] if first else [tokens, image], dim=1)
    form = match(torch.cat([whole, whole]), x)
    assert form is not None and (form.copies, form.dim, form.offset) == (2, 1, 8 * first)
    assert torch.equal(form.build(x, torch.cat([whole, whole])), torch.cat([whole, whole]))
    assert all(torch.equal(b, x) for b in form.branches(torch.cat([whole, whole]), tuple(x.shape)))
    assert match(torch.cat([whole, whole]), 1.001 * x) is None


def test_times_are_straight_lines_of_the_schedulers() -> None:
    times = {0: 999.0, 1: 500.0, 2: 20.0}

    def form(*values: Any) -> tuple[list[float], list[float]]:
        offset, factor = time_form(dict(enumerate(values)), times, 1000, "argument timestep")
        return offset.reshape(-1).tolist(), factor.reshape(-1).tolist()

    assert form(999, 500, 20) == ([0.0], [1.0])
    assert form(*(torch.tensor([t / 1000]).bfloat16() for t in times.values())) == ([0.0], [1e-3])
    assert form(*(1 - t / 1000 for t in times.values())) == ([1.0], [-1e-3])
    mixed = [torch.tensor([0.0, t, 7.0, 3 + 2 * t]) for t in times.values()]
    offset, factor = form(*mixed)
    assert offset == pytest.approx([0, 0, 7, 3], abs=1e-3)
    assert factor == pytest.approx([0, 1, 0, 2], abs=1e-6)
    with pytest.raises(ValueError, match="argument timestep follows the steps otherwise"):
        form(*((t / 1000) ** 2 for t in times.values()))
