"""The contract every diffusers scheduler is held to, as diffusers' own common suite states it."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402

# diffusers' own schedulers warn under recent numpy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
STEPS = 25


def sample() -> torch.Tensor:
    """A deterministic [4, 3, 8, 8] ramp."""
    count = 4 * 3 * 8 * 8
    return torch.arange(count).reshape(3, 8, 8, 4).div(count).permute(3, 0, 1, 2)


def make(**extra: Any) -> DLMSScheduler:
    return DLMSScheduler(**{**CONFIG, **extra})


def started(**extra: Any) -> DLMSScheduler:
    scheduler = make(**extra)
    scheduler.set_timesteps(STEPS)
    return scheduler


def test_save_config_and_load_give_the_same_step(tmp_path: Any) -> None:
    for timestep in (1, 999, 480):
        one = make()
        one.save_config(tmp_path)
        other = DLMSScheduler.from_pretrained(tmp_path)
        results = []
        for scheduler in (one, other):
            scheduler.set_timesteps(STEPS)
            out = scheduler.step(0.1 * sample(), timestep, sample(), generator=torch.manual_seed(0))
            results.append(out.prev_sample)
        assert torch.equal(*results)


def test_every_compatible_class_and_back() -> None:
    own = make()
    assert {c.__name__ for c in own.compatibles} >= {"DDIMScheduler", "UniPCMultistepScheduler"}
    for other in own.compatibles:
        back = DLMSScheduler.from_config(other.from_config(own.config).config)
        ours = {k: v for k, v in back.config.items() if k in own.config}
        assert ours == dict(own.config), other.__name__
        extra = {k for k in back.config if k not in own.config}
        assert not extra & set(inspect.signature(DLMSScheduler.__init__).parameters)


def test_config_equal_after_save_and_load(tmp_path: Any) -> None:
    own = make()
    own.save_pretrained(tmp_path)
    config = dict(own.config)
    del config["_use_default_values"]
    assert config == DLMSScheduler.from_pretrained(tmp_path).config
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["solver"] == "dpm_solver_pp"


def test_step_keeps_the_shape() -> None:
    scheduler = started()
    first = scheduler.step(0.1 * sample(), scheduler.timesteps[5], sample()).prev_sample
    second = scheduler.step(0.1 * sample(), scheduler.timesteps[6], sample()).prev_sample
    assert first.shape == second.shape == sample().shape
    assert not torch.equal(first, second)


def test_tuple_and_dict_outputs_agree_and_reset_is_complete() -> None:
    scheduler = started()
    for _ in range(3):  # a history that must not leak into the second run
        scheduler.step(0.3 * sample(), scheduler.timesteps[0], sample())
    scheduler.set_timesteps(STEPS)
    as_dict = scheduler.step(0.1 * sample(), 0, sample()).prev_sample
    scheduler.set_timesteps(STEPS)
    as_tuple = scheduler.step(0.1 * sample(), 0, sample(), return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert torch.equal(as_dict, as_tuple[0])
    assert torch.equal(as_dict, started().step(0.1 * sample(), 0, sample()).prev_sample)


def test_public_names_work_before_set_timesteps() -> None:
    scheduler = make()
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(sample(), 0.0).shape == sample().shape
    assert len(scheduler) == 1000 and scheduler.order == 1
    assert scheduler.timesteps.shape == (1000,)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(sample(), 0, sample())


def test_add_noise_takes_one_timestep_for_the_batch() -> None:
    scheduler = make()
    scheduler.set_timesteps(100)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[5][None]
    noisy = scheduler.add_noise(sample(), noise, timestep)
    bar = scheduler.alphas_cumprod[int(timestep)]
    expected = bar.sqrt() * sample() + (1 - bar).sqrt() * noise
    torch.testing.assert_close(noisy, expected, rtol=0, atol=2e-6)


def test_no_free_keyword_arguments() -> None:
    parameters = inspect.signature(DLMSScheduler.__init__).parameters
    assert "kwargs" not in parameters and DLMSScheduler._deprecated_kwargs == []
    with pytest.raises(TypeError, match="misspelt"):
        DLMSScheduler(misspelt=1)


def test_trained_betas_survive(tmp_path: Any) -> None:
    own = make(trained_betas=np.array([0.1, 0.3]))
    own.save_pretrained(tmp_path)
    assert own.betas.tolist() == DLMSScheduler.from_pretrained(tmp_path).betas.tolist()


def test_attributes_answer_as_a_config_mixin_should(caplog: Any) -> None:
    scheduler = make()
    scheduler.own_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert scheduler.own_attribute == 5
        assert scheduler.save_pretrained == getattr(scheduler, "save_pretrained")  # noqa: B009
    assert not caplog.records
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError) as error:
        scheduler.does_not_exist  # noqa: B018
    assert str(error.value) == "'DLMSScheduler' object has no attribute 'does_not_exist'"


# -- beyond the ten ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100, 999, 1000])
def test_any_number_of_steps_runs(steps: int) -> None:
    scheduler = make()
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps and len(scheduler.sigmas) == steps + 1
    assert bool((scheduler.timesteps.double().diff() < 0).all())
    x = sample()
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    assert bool(x.isfinite().all())


@pytest.mark.parametrize(
    "variant",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_lu_lambdas": True},
        {"final_sigmas_type": "sigma_min"},
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"thresholding": True},
        {"clip_sample": True},
        {"solver": "heun"},
        {"solver": "ipndm"},
        {"solver": "deis", "solver_order": 3},
    ],
    ids=str,
)
def test_config_variants_run_and_survive_saving(variant: dict[str, Any], tmp_path: Any) -> None:
    own = make(**variant)
    own.save_config(tmp_path)
    loaded = DLMSScheduler.from_pretrained(tmp_path)
    ends = []
    for scheduler in (own, loaded):
        scheduler.set_timesteps(6)
        x = sample()
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends) and bool(ends[0].isfinite().all())


def test_deepcopy_continues_the_same_run() -> None:
    one = started(solver="unipc")
    x = sample()
    for t in one.timesteps[:4]:
        x = one.step(0.1 * x, t, x).prev_sample
    two = copy.deepcopy(one)
    ends = []
    for scheduler in (one, two):
        y = x
        for t in one.timesteps[4:8]:
            y = scheduler.step(0.1 * y, t, y).prev_sample
        ends.append(y)
    assert torch.equal(*ends)
    assert two.step_index == 8


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="dpm_solver_pp"):
        make(solver="dpm++")
    with pytest.raises(ValueError, match="beta_schedule"):
        make(beta_schedule="made up")
    scheduler = make()
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(bad)
    with pytest.raises(ValueError, match="strictly decreasing"):
        scheduler.set_timesteps(timesteps=[10, 500])
    with pytest.raises(ValueError, match="both given"):
        scheduler.set_timesteps(timesteps=[500, 10], sigmas=[2.0, 1.0])
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="deterministic"):
        scheduler.step(sample(), 999, sample(), eta=0.5)
    with pytest.raises(ValueError, match="variance_type"):
        scheduler.step(torch.cat([sample(), sample()], 1), 999, sample())
    for t in scheduler.timesteps:
        scheduler.step(sample(), t, sample())
    with pytest.raises(ValueError, match="all 2 steps"):
        scheduler.step(sample(), 0, sample())
    with pytest.raises(ValueError, match="no option"):
        make(solver_options={"misspelt": 1}).set_timesteps(3)
