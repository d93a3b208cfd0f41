"""Noise models and algorithms that are not understood: refused by key and value, wherever they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402
from commands import run  # noqa: E402

from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines.distill import pipeline_denoiser  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# what the message must hold: the key and its value, or the class -> the scheduler
REFUSED: dict[str, Any] = {
    "algorithm_type is 'sde-dpmsolver++'": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "algorithm_type is 'sde-dpmsolver'": (
        "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    "algorithm_type is 'dpmsolver'": (
        "DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "predict_x0 is False": ("UniPCMultistep", {"predict_x0": False}),
    "disable_corrector is [0]": ("UniPCMultistep", {"disable_corrector": [0]}),
    "euler_at_final is True": (
        "DPMSolverMultistep", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    "interpolation_type is 'log_linear'": ("EulerDiscrete", {"interpolation_type": "log_linear"}),
    "timestep_type is 'continuous'": ("EulerDiscrete", {"timestep_type": "continuous"}),
    "sigma_max is 700.0": (
        "EulerDiscrete", {"sigma_max": 700.0, "sigma_min": 0.002, "use_karras_sigmas": True}),
    "stochastic_sampling is True": ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    "use_exponential_sigmas is True": (
        "DPMSolverMultistep", {**FLOW, "use_exponential_sigmas": True}),
    "prediction_type is 'epsilon'": (
        "UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "epsilon"}),
    "prediction_type is 'v_prediction'": ("DEISMultistep", {**FLOW, "prediction_type": "v_prediction"}),
    "LTXEulerAncestralRFScheduler": ("LTXEulerAncestralRF", {}),
    "ScoreSdeVeScheduler": ("ScoreSdeVe", {}),
    "CMStochasticIterativeScheduler": ("CMStochasticIterative", {}),
    "DDPMWuerstchenScheduler": ("DDPMWuerstchen", {}),
    "KarrasVeScheduler": ("KarrasVe", {}),
    "SCMScheduler": ("SCM", {}),
    "UnCLIPScheduler": ("UnCLIP", {}),
    "DDIMInverseScheduler": ("DDIMInverse", {}),
    "RePaintScheduler": ("RePaint", {}),
    "IPNDMScheduler": ("IPNDM", {}),
}  # fmt: skip


def scheduler(message: str) -> Any:
    name, settings = REFUSED[message]
    cls = getattr(diffusers, f"{name}Scheduler", None)
    if cls is None:
        pytest.skip(f"{name}Scheduler is not in this diffusers")
    if settings.get("prediction_type") == "epsilon":
        made = cls(**settings)
        # given by the caller, not left to the default
        made.register_to_config(_use_default_values=[])
        return made
    return cls(**settings)


@pytest.mark.parametrize("message", REFUSED)
def test_it_is_refused_by_key_and_value_wherever_it_comes_in(message: str) -> None:
    """Such configs were read as another process, without a word."""
    made = scheduler(message)
    for solver in ("unipc", "dpm_solver_pp"):
        with pytest.raises(ValueError) as found:
            DLMSScheduler.from_config(made.config, solver=solver)
        assert message in str(found.value)
    pipe = tiny.sd()
    pipe.scheduler = made
    with pytest.raises(ValueError) as found:
        pipeline_denoiser(
            pipe, **{"prompt_embeds": torch.zeros(1, 7, 8), "height": 16, "width": 16}
        )
    assert message in str(found.value)
    acceleration = accelerate(pipe, solver="dpm_solver_pp")
    assert pipe.scheduler is made and message in acceleration.report().refused
    acceleration.undo()


def test_options_of_the_chosen_solver_are_refused_too() -> None:
    made = diffusers.DPMSolverMultistepScheduler(solver_type="heun", solver_order=3)
    with pytest.raises(ValueError, match="solver_type is 'heun' with solver_order 3"):
        DLMSScheduler.from_config(made.config, solver="dpm_solver_pp")
    DLMSScheduler.from_config(made.config, solver="unipc")  # it has no such option


def test_the_command_line_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.sd(text=tiny.clip(tmp_path / "words"))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    capsys.readouterr()
    code = run("distill", "--pipeline", tmp_path / "model", "--prompts", tmp_path / "prompts.txt",
               "--output", tmp_path / "solver.safetensors")  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert code != 0 and error.startswith("dlms: ")
    assert "algorithm_type is 'sde-dpmsolver++'" in error


def test_an_unknown_key_is_refused_with_its_value() -> None:
    config = {**diffusers.DDIMScheduler().config, "noise_wobble": 0.3}
    with pytest.raises(ValueError, match=r"noise_wobble is 0\.3"):
        DLMSScheduler.from_config(config)
    renamed = {**diffusers.DDIMScheduler().config, "_class_name": "ScoreSdeVeScheduler"}
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler"):
        DLMSScheduler.from_config(renamed)


def test_keys_that_two_classes_share_are_not_guessed() -> None:
    """AnyFlow's scheduler has FlowMatchHeun's keys, and its network is told two times."""
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        pytest.skip("this diffusers has no FlowMapEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler and FlowMapEuler"):
        DLMSScheduler.from_config(diffusers.FlowMapEulerDiscreteScheduler().config)
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0).config
    named = {**heun, "_class_name": "FlowMatchHeunDiscreteScheduler"}
    assert DLMSScheduler.from_config(named).shift == 3.0


def test_a_refusal_that_never_comes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: without its checks a stochastic algorithm is read as the deterministic one."""
    from dlms_engine.integrations.scheduler import adopt

    monkeypatch.setattr(adopt, "_check", lambda *_: None)
    DLMSScheduler.from_config(scheduler("algorithm_type is 'sde-dpmsolver++'").config)


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": -1},
        {"num_train_timesteps": "many"},
        {"beta_start": "x"},
        {"beta_end": float("nan")},
        {"trained_betas": "x"},
        {"trained_betas": [[1e-4]]},
        {"trained_betas": [1e-4, None]},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused_before_anything_is_made(config: dict[str, Any]) -> None:
    """A billion levels took 8 GB, a text ended in a TypeError of torch's."""
    (key,) = config
    with pytest.raises(ValueError, match=key):
        DLMSScheduler(**config)
