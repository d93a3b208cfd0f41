"""Against the diffusers scheduler of the same name, on its own grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402
from dlms_engine.integrations.scheduler import times  # noqa: E402

# diffusers' own schedulers warn under recent numpy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOLERANCE = 1e-5
CASES = [
    ("dpm_solver_pp", "DPMSolverMultistepScheduler", {}),
    ("dpm_solver_pp", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("dpm_solver_pp", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("dpm_solver_pp", "DPMSolverMultistepScheduler", {"lower_order_final": False}),
    ("dpm_solver_pp", "DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("dpm_solver_pp", "DPMSolverMultistepScheduler", {"thresholding": True}),
    ("unipc", "UniPCMultistepScheduler", {}),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}),
    ("deis", "DEISMultistepScheduler", {}),
    ("deis", "DEISMultistepScheduler", {"solver_order": 3}),
    ("ddim", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    ("ddim", "DDIMScheduler", {"clip_sample": False}),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("ddim", "DDIMScheduler", {"clip_sample": True}),
]


def start() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def network(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """The optimal prediction for Gaussian data of std 0.5, plus a wiggle."""
    bar = scheduler.alphas_cumprod[int(t)].double()
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    noise = sigma / (alpha**2 * 0.25 + sigma**2) * x.double() + 0.05 * torch.sin(2 * x.double())
    if scheduler.config.prediction_type == "v_prediction":
        return (noise - sigma * x) / alpha
    return noise


def run(scheduler: Any, steps: int, begin: int = 0) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    if begin:
        scheduler.set_begin_index(begin)
    x = start()
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(scheduler, x, t).float(), t, x, return_dict=False)[0]
    return x


def pair(solver: str, name: str, options: dict[str, Any], **ours: Any) -> tuple[Any, Any]:
    reference = getattr(diffusers, name)(**CONFIG, **options)
    return reference, DLMSScheduler.from_config(reference.config, solver=solver, **ours)


@pytest.mark.parametrize("steps", [1, 5, 8, 20])
@pytest.mark.parametrize(("solver", "name", "options"), CASES, ids=str)
def test_reproduces_the_diffusers_scheduler(
    solver: str, name: str, options: dict[str, Any], steps: int
) -> None:
    reference, own = pair(solver, name, options)
    expected, found = run(reference, steps), run(own, steps)
    assert own.timesteps.tolist() == reference.timesteps.tolist()
    assert own.timesteps.dtype == torch.int64
    if solver == "deis" and options.get("solver_order") == 3:
        # diffusers rounds its third-order integrals, differences of large terms, to float32
        reference.set_timesteps(steps)
        reference.sigmas = reference.sigmas.double()
        expected = run_from(reference)
    assert (expected - found).abs().max() < TOLERANCE


def run_from(scheduler: Any) -> torch.Tensor:
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler, x, t).float(), t, x, return_dict=False)[0].float()
    return x


@pytest.mark.parametrize(("solver", "name", "options"), CASES[:10], ids=str)
def test_reproduces_a_late_start(solver: str, name: str, options: dict[str, Any]) -> None:
    if options.get("solver_order") == 3 and solver == "deis":
        pytest.skip("float32 integrals, see above")
    reference, own = pair(solver, name, options)
    for steps, begin in ((6, 2), (20, 9), (5, 4)):
        difference = (run(reference, steps, begin) - run(own, steps, begin)).abs().max()
        assert difference < TOLERANCE, (steps, begin)


def test_the_comparison_can_fail() -> None:
    """One order less, or a grid shifted by one training step, must be seen."""
    reference, own = pair("dpm_solver_pp", "DPMSolverMultistepScheduler", {})
    wrong_order = DLMSScheduler.from_config(own.config, solver_order=1)
    assert (run(reference, 8) - run(wrong_order, 8)).abs().max() > 100 * TOLERANCE
    reference, own = pair("ddim", "DDIMScheduler", {"clip_sample": False})
    shifted = DLMSScheduler.from_config(own.config, steps_offset=1)
    assert (run(reference, 8) - run(shifted, 8)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_modified_sigmas_are_those_of_diffusers(name: str) -> None:
    options = {f"use_{name}_sigmas": True}
    reference, own = pair("dpm_solver_pp", "DPMSolverMultistepScheduler", options)
    reference.set_timesteps(7)
    own.set_timesteps(7)
    torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=2e-5, atol=1e-6)
    # fractional times: diffusers rounds them to whole ones
    assert own.timesteps.dtype == torch.float32
    assert (own.timesteps - reference.timesteps).abs().max() <= 1.0


def test_flow_grid_is_that_of_flow_match_euler() -> None:
    for options in ({"shift": 3.0}, {"shift": 1.0, "shift_terminal": 0.1}):
        reference = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        own = DLMSScheduler.from_config(reference.config, solver="unipc")
        for steps in (2, 4, 28):
            reference.set_timesteps(steps)
            own.set_timesteps(steps)
            torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(own.timesteps, reference.timesteps, rtol=1e-6, atol=1e-4)


def test_dynamic_shift_and_custom_sigmas_of_flows() -> None:
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    own = DLMSScheduler.from_config(reference.config, solver="unipc")
    for sigmas in ([1.0, 0.8, 0.5, 0.2], [0.9, 0.3]):
        reference.set_timesteps(sigmas=sigmas, mu=0.7)
        own.set_timesteps(sigmas=sigmas, mu=0.7)
        torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-7)
        own.set_timesteps(sigmas=[*sigmas, 0.0], mu=0.7)  # N + 1 values with the final zero
        torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="mu"):
        own.set_timesteps(4)


def test_both_names_of_the_shift() -> None:
    by_shift = DLMSScheduler(prediction_type="flow_prediction", shift=3.0)
    by_flow_shift = DLMSScheduler(prediction_type="flow_prediction", flow_shift=3.0)
    none = DLMSScheduler(prediction_type="flow_prediction")
    for scheduler in (by_shift, by_flow_shift, none):
        scheduler.set_timesteps(4)
    assert torch.equal(by_shift.sigmas, by_flow_shift.sigmas)
    assert not torch.allclose(by_shift.sigmas, none.sigmas)
    both = DLMSScheduler(prediction_type="flow_prediction", shift=3.0, flow_shift=2.0)
    with pytest.raises(ValueError, match="differ"):
        both.set_timesteps(4)


def test_flow_config_is_recognised_and_loses_nothing() -> None:
    multistep = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    )
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    for source in (multistep, euler):
        own = DLMSScheduler.from_config(source.config, solver="unipc")
        assert own.config.prediction_type == "flow_prediction"
        assert own.config.use_flow_sigmas == (source is multistep)  # as FLUX's pipelines read it
        own.set_timesteps(4)
        source.set_timesteps(4)
        torch.testing.assert_close(own.sigmas, source.sigmas, rtol=1e-6, atol=1e-7)


def test_float_timesteps_are_not_truncated() -> None:
    own = DLMSScheduler(**CONFIG)
    own.set_timesteps(timesteps=[900.5, 400.25, 10.125])
    assert own.timesteps.tolist() == [900.5, 400.25, 10.125]
    own.set_timesteps(sigmas=[14.0, 3.0, 0.3])
    torch.testing.assert_close(own.sigmas, torch.tensor([14.0, 3.0, 0.3, 0.0]))
    assert own.timesteps.dtype == torch.float32


def test_edm_configs_follow_the_edm_scheduler() -> None:
    reference = diffusers.EDMDPMSolverMultistepScheduler(sigma_max=80.0)
    own = DLMSScheduler.from_config(reference.config, solver="dpm_solver_pp")
    ends = []
    for scheduler in (reference, own):
        scheduler.set_timesteps(8)
        x = start() * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.sin(scaled) * 0.3, t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(own.timesteps, reference.timesteps, rtol=1e-5, atol=1e-5)
    assert (ends[0] - ends[1]).abs().max() < TOLERANCE


def test_cogvideox_divides_the_signal_to_noise_ratio() -> None:
    reference = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    own = DLMSScheduler.from_config(reference.config, solver="ddim")
    torch.testing.assert_close(
        own.alphas_cumprod[:-1], reference.alphas_cumprod[:-1].float(), rtol=1e-5, atol=1e-8
    )
    reference.set_timesteps(5)
    own.set_timesteps(5)
    assert own.timesteps.tolist() == reference.timesteps.tolist()
    x = expected = start()
    for t in own.timesteps:
        x = own.step(0.3 * torch.sin(x), t, x, return_dict=False)[0]
    for t in reference.timesteps:
        expected = reference.step(0.3 * torch.sin(expected), t, expected, return_dict=False)[0]
    # the run started at alpha 2 ** -12, where diffusers starts at 0
    assert (x - expected.float()).abs().max() < TOLERANCE * x.abs().max()


def test_continuous_karras_levels_of_stable_video_diffusion() -> None:
    reference = diffusers.EulerDiscreteScheduler(
        **CONFIG, prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0,
        timestep_type="continuous", use_karras_sigmas=True, timestep_spacing="leading",
    )  # fmt: skip
    own = DLMSScheduler.from_config(reference.config, solver="ddim")
    ends = []
    for scheduler in (reference, own):
        scheduler.set_timesteps(5)
        x = start() * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(0.3 * torch.sin(scaled), t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(own.timesteps, reference.timesteps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-5, atol=1e-6)
    assert (ends[0] - ends[1]).abs().max() < 1e-4 * ends[0].abs().max()


def test_times_and_levels_given_together() -> None:
    """CogView4 and GLM-Image hand over both; the network's times are then used as given."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    own = DLMSScheduler.from_config(reference.config, solver="unipc")
    given = [1000, 667, 334, 1]
    for scheduler in (reference, own):
        scheduler.set_timesteps(timesteps=given, sigmas=[t / 1000 for t in given], mu=0.5)
    torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(own.timesteps, reference.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("version", "second"), [("0.42.0", 667.0), ("0.41.0", 500.375), ("0.35.1", 500.375)]
)
def test_given_times_of_flows_as_the_installed_version_has_them(
    version: str, second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 0.42 they were made of the shifted levels again."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    times._uses_given_times.cache_clear()
    try:
        config = diffusers.FlowMatchEulerDiscreteScheduler(shift=0.5).config
        scheduler = DLMSScheduler.from_config(config, solver="unipc")
        scheduler.set_timesteps(timesteps=[1000, 667, 334, 1])
        assert abs(float(scheduler.timesteps[1]) - second) < 1e-2
    finally:
        times._uses_given_times.cache_clear()


def test_defaults_of_another_class_give_way_as_in_diffusers() -> None:
    """SD 1.5's PNDM spaces "leading" by default: carried over, the first time was 801, not 999."""
    source = diffusers.PNDMScheduler(**CONFIG, skip_prk_steps=True, steps_offset=1)
    reference = diffusers.DPMSolverMultistepScheduler.from_config(source.config)
    own = DLMSScheduler.from_config(source.config, solver="dpm_solver_pp")
    for scheduler in (reference, own):
        scheduler.set_timesteps(4)
    assert own.timesteps.tolist() == reference.timesteps.tolist() == [999, 749, 500, 250]


def test_inverted_flows_step_towards_one() -> None:
    """OmniGen and Mochi count their levels from the data's side."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=2.0)
    own = DLMSScheduler.from_config(reference.config, solver="ddim")
    ends = []
    for scheduler in (reference, own):
        scheduler.set_timesteps(6)
        x = start()
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * torch.sin(x), t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own.timesteps, reference.timesteps, rtol=1e-6, atol=1e-3)
    assert (ends[0] - ends[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("spacing", [None, "leading"])
def test_what_a_pipeline_changed_on_its_scheduler_counts(spacing: str | None) -> None:
    """Stable Diffusion sets steps_offset and clip_sample: listed as defaults still, they were lost."""
    pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
    import tiny_pipelines as tiny

    given = {} if spacing is None else {"timestep_spacing": spacing}
    sources = {
        "ddim": diffusers.DDIMScheduler(beta_schedule="scaled_linear", **given),
        "unipc": diffusers.UniPCMultistepScheduler(beta_schedule="scaled_linear", **given),
        "dpm_solver_pp": diffusers.DPMSolverMultistepScheduler(**given),
    }
    for solver, source in sources.items():
        parts = {**tiny.sd().components, "scheduler": source}
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        assert pipe.scheduler.config.steps_offset == 1
        own = DLMSScheduler.from_config(pipe.scheduler.config, solver=solver)
        ends = []
        for scheduler in (pipe.scheduler, own):
            scheduler.set_timesteps(4)
            x = start()
            for t in scheduler.timesteps:
                x = scheduler.step(torch.sin(x), t, x, return_dict=False)[0]
            ends.append(x)
        assert own.timesteps.tolist() == pipe.scheduler.timesteps.tolist()
        assert (ends[0] - ends[1]).abs().max() < TOLERANCE * ends[0].abs().max()
