"""Every supported pipeline, against the diffusers scheduler that computes the same thing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
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
    "sdxl-inpaint": (
        lambda: tiny.sdxl("Inpaint"),
        lambda: {
            **tiny.sdxl_inputs(), **SIZE, "image": IMAGE, "mask_image": MASK, "strength": 0.8,
        },
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
    "sd3-inpaint": (
        lambda: tiny.sd3("Inpaint"),
        lambda: {**tiny.sd3_inputs(), "image": IMAGE, "mask_image": MASK, "strength": 0.8},
    ),
    "flux": (tiny.flux, tiny.flux_inputs),
    "flux-inpaint": (
        lambda: tiny.flux("Inpaint"),
        lambda: {**tiny.flux_inputs(), "image": IMAGE, "mask_image": MASK, "strength": 0.8},
    ),
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


def oracle(case: str, config: Any) -> tuple[Any, Any]:
    """diffusers' scheduler and ours for the same solver on the same grid."""
    if case in FLOW:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            config
        ), DLMSScheduler.from_config(config, solver="ddim")
    leading = {"timestep_spacing": "leading"}
    return diffusers.DPMSolverMultistepScheduler.from_config(
        config, **leading
    ), DLMSScheduler.from_config(
        config, solver="dpm_solver_pp", final_sigmas_type="zero", **leading
    )


TEXT_TO_IMAGE = ("sd", "sdxl", "sd3", "flux-static-shift")


@pytest.mark.parametrize("case", TEXT_TO_IMAGE)
def test_callbacks_that_change_latents(case: str) -> None:
    """The changed latents are taken over, the history goes on, as in diffusers."""
    make, inputs = (VP | FLOW)[case]
    pipe = make()

    def halve(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if i == 1 else tensors

    asked = {**STEPS, "callback_on_step_end": halve}
    found = []
    for scheduler in oracle(case, pipe.scheduler.config):
        pipe.scheduler = scheduler
        found.append(images(pipe, {**inputs(), **asked}))
    assert_same(*found)
    plain = images(pipe, {**inputs(), **STEPS})
    assert (plain - found[1]).abs().max() > 1e-3  # the callback did something


@pytest.mark.parametrize("case", TEXT_TO_IMAGE)
def test_interrupted_and_copied_pipelines(case: str) -> None:
    """A copy of a scheduler that was stopped in the middle runs a whole image as a new one does."""
    make, inputs = (VP | FLOW)[case]
    pipe = make()
    _, scheduler = oracle(case, pipe.scheduler.config)
    pipe.scheduler = scheduler
    expected = images(pipe, {**inputs(), **STEPS})

    def stop(pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return tensors

    images(pipe, {**inputs(), **STEPS, "callback_on_step_end": stop})
    assert scheduler.step_index == 3
    pipe.scheduler = copy.deepcopy(scheduler)
    assert torch.equal(images(pipe, {**inputs(), **STEPS}), expected)
    pipe.scheduler = scheduler
    assert torch.equal(images(pipe, {**inputs(), **STEPS}), expected)


@pytest.mark.parametrize("case", TEXT_TO_IMAGE)
def test_bfloat16_pipelines(case: str) -> None:
    """bfloat16 in and out, float32 within; the state is the shadow, so steps do not round."""
    make, inputs = (VP | FLOW)[case]
    pipe = make().to(torch.bfloat16)
    _, pipe.scheduler = oracle(case, pipe.scheduler.config)
    asked = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
    out = images(pipe, {**asked, **STEPS})
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
    shadow = pipe.scheduler._runner._state
    assert shadow._x.dtype == torch.float32
    assert torch.equal(shadow._x.bfloat16().reshape(out.shape), out)


def test_custom_sigmas_reach_flux() -> None:
    pipe = tiny.flux()
    inputs = {"sigmas": [1.0, 0.8, 0.5, 0.2]}
    expected = images(pipe, {**tiny.flux_inputs(), **inputs})
    config = pipe.scheduler.config
    pipe.scheduler = DLMSScheduler.from_config(config, solver="ddim")
    assert_same(expected, images(pipe, {**tiny.flux_inputs(), **inputs}))
    # where a config has use_flow_sigmas FLUX passes none, for diffusers' own multistep classes too
    multistep = {**config, "use_flow_sigmas": True, "_class_name": "UniPCMultistepScheduler"}
    reference = diffusers.UniPCMultistepScheduler.from_config(multistep)
    pipe.scheduler = DLMSScheduler.from_config(multistep, solver="unipc")
    for asked in ({"num_inference_steps": 4}, inputs):
        pipe(**tiny.flux_inputs(), **asked)
        reference.set_timesteps(4, mu=0.6)
        pipe.scheduler.set_timesteps(4, mu=0.6)
        torch.testing.assert_close(pipe.scheduler.sigmas, reference.sigmas, rtol=1e-6, atol=1e-6)
    pipe.scheduler = DLMSScheduler.from_config(multistep, solver="unipc", use_flow_sigmas=False)
    pipe(**tiny.flux_inputs(), **inputs)
    given = pipe.scheduler.sigmas[1:4]
    pipe(**tiny.flux_inputs(), num_inference_steps=4)
    assert (given - pipe.scheduler.sigmas[1:4]).abs().max() > 0.03


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_sigmas_are_taken_as_they_are(shift: float, steps: int) -> None:
    """linspace(1, 1 / N, N) was taken for none at all: a grid 1e-3 from UniPC's."""
    reference = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    own = DLMSScheduler.from_config(reference.config, solver="unipc")
    levels = np.linspace(1.0, 1 / steps, steps)
    ends = []
    for scheduler in (reference, own):
        scheduler.set_timesteps(sigmas=levels)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for n, t in enumerate(scheduler.timesteps):
            f = torch.tanh(1.3 * x + float(reference.sigmas[n]))
            x = scheduler.step(f, t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-6)
    assert (ends[0] - ends[1]).abs().max() < 1e-5 * ends[0].abs().max()


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
