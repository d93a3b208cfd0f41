"""What a caller changes on a scheduler between runs counts, and what two schedulers share does not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402
from dlms_engine.integrations.scheduler import tables  # noqa: E402
from dlms_engine.integrations.scheduler.noise import NoiseModel  # noqa: E402

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def run(scheduler: Any, **asked: Any) -> Tensor:
    scheduler.set_timesteps(**(asked or {"num_inference_steps": 4}))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * torch.tanh(x), t, x, return_dict=False)[0]
    return x


def test_a_config_that_changes_after_a_run_counts() -> None:
    """The prediction type of the first run was kept for good."""
    scheduler = DLMSScheduler(**CONFIG, solver="unipc")
    before = run(scheduler)
    model = scheduler.noise_model
    assert scheduler.noise_model is model  # made once, not for every run
    for again in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(run(again), before)
    scheduler.register_to_config(prediction_type="v_prediction")
    expected = DLMSScheduler(**CONFIG, solver="unipc", prediction_type="v_prediction")
    found = run(scheduler)
    assert torch.equal(found, run(expected)) and not torch.allclose(found, before)


def bent() -> Any:
    scheduler = DLMSScheduler(**CONFIG, solver="unipc")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    return scheduler


def with_a_twin() -> tuple[Tensor, Tensor]:
    """A scheduler with noise levels of its own: alone, and after one that has the config's."""
    asked = {"timesteps": [999, 700, 400, 100]}
    tables._cache.clear()
    alone = run(bent(), **asked)
    tables._cache.clear()
    run(DLMSScheduler(**CONFIG, solver="unipc"), **asked)
    return alone, run(bent(), **asked)


def test_a_table_is_remembered_for_its_noise_levels() -> None:
    """Tables were told apart by the config's betas, which are not all that levels are made of."""
    assert torch.equal(*with_a_twin())


def test_a_table_of_other_noise_levels_is_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(NoiseModel, "key", "the same")
    alone, after = with_a_twin()
    assert (alone - after).abs().max() > 1


def test_options_that_ddim_does_not_take_are_refused() -> None:
    """Its own steps of a fixed stride need no table: every option passed."""
    scheduler = DLMSScheduler(**CONFIG, solver="ddim", solver_options={"ordre": 2})
    with pytest.raises(ValueError, match="no option.*ordre"):
        scheduler.set_timesteps(4)
    run(DLMSScheduler(**CONFIG, solver="ddim", solver_options={"prediction": "data"}))


def evaluations(scheduler: Any, strength: float, steps: int) -> int:
    pipe = tiny.sd("Img2Img")
    pipe.scheduler = scheduler(pipe.scheduler.config)
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    asked = {"image": image, "strength": strength, "num_inference_steps": steps}
    pipe(**tiny.sd_inputs(), **asked)
    return len(calls)


def ours(solver: str) -> Any:
    return lambda config: DLMSScheduler.from_config(config, solver=solver)


@pytest.mark.parametrize("solver", ["heun", "dpm_solver_2", "dpm_solver_pp_2s"])
def test_strength_counts_steps_of_two_evaluations(solver: str, monkeypatch: Any) -> None:
    """Half of ten steps are nine evaluations, as with diffusers' Heun; fourteen were made."""
    theirs = evaluations(diffusers.HeunDiscreteScheduler.from_config, 0.5, 10)
    assert evaluations(ours(solver), 0.5, 10) == theirs == 9
    assert evaluations(ours("unipc"), 0.5, 10) == 5
    # planted fault: one row counted for a step
    monkeypatch.setattr(DLMSScheduler, "order", 1)
    assert evaluations(ours(solver), 0.5, 10) == 14


def test_given_times_are_counted_one_by_one() -> None:
    """Pipelines that pass sigmas count the rows of the schedule themselves."""
    scheduler = DLMSScheduler(prediction_type="flow_prediction", solver="heun")
    assert scheduler.order == 2
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.order == 1 and len(scheduler.timesteps) == 7
    scheduler.set_timesteps(4)
    assert scheduler.order == 2 and len(scheduler.timesteps) == 7
    with pytest.raises(ValueError, match=r"strength to 0\.25"):
        scheduler.set_begin_index(7)


@pytest.mark.parametrize("order", [0, -1, 2.5, 7])
def test_an_order_that_deis_does_not_have_is_named(order: Any) -> None:
    """7 ran, 0 ended in an IndexError."""
    with pytest.raises(ValueError, match=r"order is .* expected an integer in 1\.\.4"):
        DLMSScheduler(**CONFIG, solver="deis", solver_order=order).set_timesteps(8)
