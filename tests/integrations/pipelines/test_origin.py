"""A distilled solver knows what it was distilled for; each difference at use is said once, by name."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine import grids, solvers  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines.distill import distill_pipeline  # noqa: E402
from dlms_engine.integrations.scheduler import origin  # noqa: E402
from dlms_engine.policies.distilled import load_solver  # noqa: E402
from dlms_engine.policies.dlms import Designer, DesignerSettings  # noqa: E402
from dlms_engine.processes import RectifiedFlow  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"height": 16, "width": 16}
TINY = {
    "trajectories": 4, "batch": 2, "validation_samples": 2, "validation_steps": 4, "validate_every": 0,
    "progress": False, "afs": False, "method": "dlms",
}  # fmt: skip


def given(**extra: Any) -> dict[str, Any]:
    return {**tiny.sd_inputs(), **SIZE, "num_inference_steps": 2, **extra}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A solver of two evaluations for ``tiny.sd()``, 16 pixels wide, at its guidance."""
    path = tmp_path_factory.mktemp("origin") / "solver.safetensors"
    asked = {k: v for k, v in given().items() if k not in ("generator", "guidance_scale")}
    distill_pipeline(
        tiny.sd(),
        nfe=2,
        guidance_scale=tiny.GUIDANCE,
        pipeline_arguments=asked,
        output=path,
        **TINY,
    )
    return path


def other_weights() -> Any:
    pipe = tiny.sd()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.3).add_(0.01)
    return pipe


def image_to_image() -> Any:
    return tiny.sd("Img2Img")


PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))
USES: dict[str, Any] = {
    "nothing": (tiny.sd, {}),
    "class": (image_to_image, {"image": PICTURE, "strength": 1.0, "height": None, "width": None}),
    "model": (other_weights, {}),
    "guidance_scale": (tiny.sd, {"guidance_scale": 5.5}),
    "latents": (tiny.sd, {"height": 32, "width": 32}),
}


def said(caplog: Any, file: Path, use: str, how: str) -> list[str]:
    """Warnings of three runs of a pipeline with the solver in ``file``."""
    make, extra = USES[use]
    pipe, asked = make(), given(**extra)
    asked = {k: v for k, v in asked.items() if v is not None}
    if how == "accelerated":
        accelerate(pipe, solver=str(file))
    else:
        pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=str(file))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        for _ in range(3):
            pipe(**asked)
    return [r.getMessage() for r in caplog.records if r.name == "dlms_engine"]


def test_the_file_says_what_it_was_made_for(file: Path) -> None:
    found = origin.origin_of(load_solver(file))
    assert found["class"] == "StableDiffusionPipeline"
    assert found["latents"] == [4, 8, 8] and found["nfe"] == 2
    assert found["guidance_scale"] == tiny.GUIDANCE
    assert len(found["weights"]) == origin.WEIGHTS and any(found["weights"])
    assert set(found) == {"class", "model", "weights", "latents", "guidance_scale", "nfe"}


@pytest.mark.parametrize("how", ["step by step", "accelerated"])
@pytest.mark.parametrize("use", USES)
def test_each_difference_is_said_once_and_by_name(
    caplog: Any, file: Path, use: str, how: str
) -> None:
    messages = said(caplog, file, use, how)
    if use == "nothing":
        assert messages == []
    else:
        assert len(messages) == 1 and f"distilled for {use} " in messages[0]


@pytest.mark.parametrize("how", ["step by step", "accelerated"])
def test_another_number_of_evaluations_is_an_error(file: Path, how: str) -> None:
    pipe = tiny.sd()
    if how == "accelerated":
        accelerate(pipe, solver=str(file))
    else:
        pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=str(file))
    with pytest.raises(
        ValueError, match="made for 2 evaluations: pass num_inference_steps=2, not 4"
    ):
        pipe(**given(num_inference_steps=4))


def test_half_precision_is_the_same_model(caplog: Any, file: Path) -> None:
    pipe = tiny.sd().to(torch.bfloat16)
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=str(file))
    asked = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in given().items()}
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        pipe(**asked)
    assert [r for r in caplog.records if r.name == "dlms_engine"] == []


def test_a_check_that_looks_at_nothing_is_seen(caplog: Any, file: Path, monkeypatch: Any) -> None:
    """Planted fault: the pipeline is not found among the callers."""
    monkeypatch.setattr(origin, "calling_pipeline", lambda _: (None, []))
    assert said(caplog, file, "model", "step by step") == []


def test_rubbish_in_a_file_is_not_compared() -> None:
    rubbish = {"class": 3, "weights": "abc", "latents": None, "nfe": {}}
    check = origin.OriginCheck(SimpleNamespace(settings={"pipeline": rubbish}))
    check.caller(object())
    check.latents((1, 4, 8, 8))
    assert origin.origin_of(SimpleNamespace(settings={"pipeline": [1]})) == {}


def test_a_dropped_bottleneck_is_a_warning(caplog: Any) -> None:
    from dlms_engine.integrations.pipelines.distill import _attach, pipeline_denoiser

    asked = {k: v for k, v in given().items() if k not in ("generator", "guidance_scale")}
    denoiser, shape = pipeline_denoiser(tiny.sd(), guidance_scale=tiny.GUIDANCE, **asked)
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        assert not _attach(denoiser, "network.mid_block", shape)
        assert not _attach(denoiser, "no_such_block", shape)
    assert all("every sample gets the same rows" in r.getMessage() for r in caplog.records)
    assert len(caplog.records) == 2


def test_rows_per_sample_at_another_resolution_say_so() -> None:
    """They failed inside a matrix product."""
    grid = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0], [1.5, -0.5], [1.5, -0.5]], dtype=torch.float64)
    settings = DesignerSettings(steps=3, order=2, afs=False, coordinate="linear")
    designer = Designer(settings, RectifiedFlow(), grid, weights)
    with pytest.raises(ValueError, match="another size at this resolution"):
        designer(torch.zeros(2, 256), torch.ones(2).double(), 1)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_late_start_says_what_runs(accelerated: bool, caplog: Any) -> None:
    """Image-to-image took the tail of a learned solver without a word; a handcrafted one is made anew."""
    pipe = tiny.sd("Img2Img")
    model = DLMSScheduler.from_config(pipe.scheduler.config, solver="ddim").noise_model
    table = solvers.dpm_solver_pp(model.process, grids.time_uniform(model.process, 4), order=2)
    asked = {**tiny.sd_inputs(), "image": PICTURE, "num_inference_steps": 4}

    def said(solver: Any, *strengths: float) -> list[str]:
        caplog.clear()
        acceleration = accelerate(pipe, solver=solver) if accelerated else None
        if acceleration is None:
            pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=solver)
        for strength in strengths:
            pipe(**{**asked, "strength": strength})
        if acceleration is not None:
            acceleration.undo()
        return [r.getMessage() for r in caplog.records if "the run begins" in r.getMessage()]

    messages = said(table, 0.5, 0.5, 0.5, 0.8)
    assert len(messages) == 2  # once for each start
    assert "step 2 of 4" in messages[0] and "last 2 steps" in messages[0]
    assert "Strength 0.75 to 1" in messages[0] and 'solver="unipc"' in messages[0]
    assert said(table, 1.0) == said("unipc", 0.5) == []
