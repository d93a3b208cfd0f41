"""Every supported pipeline, against the diffusers scheduler that computes the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers', about its own arguments
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(1, 1, 16, 16)
MASK[..., :8] = 0
SIZE = {"height": 16, "width": 16}
STEPS = {"num_inference_steps": 5}
Case = tuple[Callable[[], Any], Callable[[], dict[str, Any]]]

VP: dict[str, Case] = {
    "sd": (tiny.sd, lambda: {**tiny.sd_inputs(), **SIZE}),
    "sd-img2img": (
        lambda: tiny.sd("Img2Img"),
        lambda: {**tiny.sd_inputs(), "image": IMAGE, "strength": 0.6},
    ),
    "sd-inpaint": (
        lambda: tiny.sd("Inpaint"),
        lambda: {
            **tiny.sd_inputs(), **SIZE, "image": IMAGE, "mask_image": MASK, "strength": 0.8,
        },
    ),
    "sdxl": (tiny.sdxl, lambda: {**tiny.sdxl_inputs(), **SIZE}),
    "sdxl-denoising-end": (
        tiny.sdxl, lambda: {**tiny.sdxl_inputs(), **SIZE, "denoising_end": 0.6},
    ),
    "sdxl-img2img": (
        lambda: tiny.sdxl("Img2Img"),
        lambda: {**tiny.sdxl_inputs(), "image": IMAGE, "strength": 0.6},
    ),
    "sdxl-refiner": (
        lambda: tiny.sdxl("Img2Img"),
        lambda: {**tiny.sdxl_inputs(), "image": IMAGE, "denoising_start": 0.4},
    ),
}  # fmt: skip
FLOW: dict[str, Case] = {
    "sd3": (tiny.sd3, tiny.sd3_inputs),
    "sd3-dynamic-shift": (lambda: tiny.sd3(use_dynamic_shifting=True), tiny.sd3_inputs),
    "sd3-img2img": (
        lambda: tiny.sd3("Img2Img"),
        lambda: {**tiny.sd3_inputs(), "image": IMAGE, "strength": 0.6},
    ),
    "flux": (tiny.flux, tiny.flux_inputs),
    "flux-static-shift": (lambda: tiny.flux(use_dynamic_shifting=False), tiny.flux_inputs),
    "flux-img2img": (
        lambda: tiny.flux("Img2Img"),
        lambda: {**tiny.flux_inputs(), "image": IMAGE, "strength": 0.6},
    ),
}


def images(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return torch.as_tensor(pipe(**inputs).images)


def assert_same(expected: torch.Tensor, found: torch.Tensor) -> None:
    assert bool(found.isfinite().all())
    difference = (expected - found).abs().max() / expected.abs().max()
    assert difference < 2e-5, f"relative difference {difference:.2e}"


@pytest.mark.parametrize("case", VP)
@pytest.mark.parametrize(
    ("solver", "name"),
    [("dpm_solver_pp", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")],
)
def test_vp_pipelines(case: str, solver: str, name: str) -> None:
    make, inputs = VP[case]
    pipe = make()
    config = pipe.scheduler.config
    pipe.scheduler = getattr(diffusers, name).from_config(config, timestep_spacing="leading")
    expected = images(pipe, {**inputs(), **STEPS})
    pipe.scheduler = DLMSScheduler.from_config(
        config, solver=solver, timestep_spacing="leading", final_sigmas_type="zero"
    )
    assert_same(expected, images(pipe, {**inputs(), **STEPS}))


@pytest.mark.parametrize("case", FLOW)
def test_flow_pipelines(case: str) -> None:
    """DDIM on a flow is Euler: FlowMatchEuler is the oracle, image-to-image included."""
    make, inputs = FLOW[case]
    pipe = make()
    expected = images(pipe, {**inputs(), **STEPS})
    flow_config = pipe.scheduler.config
    pipe.scheduler = DLMSScheduler.from_config(flow_config, solver="ddim")
    assert_same(expected, images(pipe, {**inputs(), **STEPS}))
    pipe.scheduler = DLMSScheduler.from_config(flow_config, solver="dpm_solver_pp")
    second = images(pipe, {**inputs(), **STEPS})
    assert bool(second.isfinite().all())
    assert (expected - second).abs().max() > 1e-4  # another solver, another image


def test_custom_sigmas_reach_flux() -> None:
    pipe = tiny.flux()
    inputs = {"sigmas": [1.0, 0.8, 0.5, 0.2]}
    expected = images(pipe, {**tiny.flux_inputs(), **inputs})
    config = pipe.scheduler.config
    pipe.scheduler = DLMSScheduler.from_config(config, solver="ddim")
    assert_same(expected, images(pipe, {**tiny.flux_inputs(), **inputs}))
    # a config written for a multistep class must not switch them off
    multistep = {**config, "use_flow_sigmas": True, "_class_name": "UniPCMultistepScheduler"}
    pipe.scheduler = DLMSScheduler.from_config(multistep, solver="ddim")
    assert_same(expected, images(pipe, {**tiny.flux_inputs(), **inputs}))


@pytest.mark.parametrize("kind", ["timesteps", "sigmas"])
def test_custom_schedules_reach_sd(kind: str) -> None:
    pipe = tiny.sd()
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="dpm_solver_pp")
    chosen = [850.0, 430.5, 100.0] if kind == "timesteps" else [9.0, 2.0, 0.4, 0.0]
    asked: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _m, args: asked.append(float(args[1])))
    out = images(pipe, {**tiny.sd_inputs(), **SIZE, kind: chosen})
    assert len(asked) == 3 and bool(out.isfinite().all())
    if kind == "timesteps":
        assert asked == chosen


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_unconditional_pipelines(name: str) -> None:
    pipe = tiny.unconditional(name)
    inputs = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}

    def generator() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(0)}

    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    expected = images(pipe, {**inputs, **generator()})
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="ddim")
    assert_same(expected, images(pipe, {**inputs, **generator()}))


def test_dit_pipeline() -> None:
    pipe = tiny.dit()
    inputs = {"class_labels": [1, 2], "num_inference_steps": 5, "output_type": "np"}

    def generator() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(0)}

    expected = images(pipe, {**inputs, **generator()})
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="ddim")
    assert_same(expected, images(pipe, {**inputs, **generator()}))


def test_saved_pipeline_loads_with_its_scheduler(tmp_path: Any) -> None:
    pipe = tiny.unconditional("DDPM")
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DLMSScheduler
    assert loaded.scheduler.config["solver"] == "unipc"
    assert DLMSScheduler.__module__ == "dlms_engine.integrations.diffusers"


def test_the_comparison_can_fail() -> None:
    """A history that survives into an image-to-image start would be seen."""
    make, inputs = VP["sd-img2img"]
    pipe = make()
    config = pipe.scheduler.config
    settings = {"timestep_spacing": "leading", "final_sigmas_type": "zero"}
    pipe.scheduler = DLMSScheduler.from_config(config, solver="dpm_solver_pp", **settings)
    expected = images(pipe, {**inputs(), **STEPS})
    begin = pipe.scheduler.set_begin_index
    pipe.scheduler.set_begin_index = lambda index: begin(index - 1)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_same(expected, images(pipe, {**inputs(), **STEPS}))
