"""What pipelines ask of other classes' schedulers: given, or refused by name."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
import extras  # noqa: E402
import images  # noqa: E402
from cells import CASES, output_of  # noqa: E402

from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.scheduler import runner  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (1, 4, 8, 8)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("LatentConsistencyModelPipeline", "original_inference_steps"),
        ("LTXConditionPipeline", "per_token_timesteps"),
    ],
)
def test_other_arguments_are_refused_by_name(name: str, argument: str) -> None:
    """They were a TypeError; accelerated, the pipeline's own scheduler runs."""
    make, inputs = CASES[name]
    pipe = make()
    expected = output_of(pipe, {**inputs(), "num_inference_steps": 2})
    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config)
    with pytest.raises(ValueError, match=f"passes {argument} to scheduler"):
        pipe(**inputs(), num_inference_steps=2)
    pipe.scheduler = original
    acceleration = accelerate(pipe)
    for _ in range(2):
        assert torch.equal(output_of(pipe, {**inputs(), "num_inference_steps": 2}), expected)
    assert argument in acceleration.report().reason


def test_a_noise_level_is_not_scaled_like_latents() -> None:
    """The latent upscaler made its data prediction as for Euler's states: the pictures were wrong."""
    ours = DLMSScheduler.from_config(diffusers.EulerDiscreteScheduler().config, solver="unipc")
    ours.set_timesteps(3)
    latents = numbers(1)
    assert ours.scale_model_input(latents, ours.timesteps[0]) is latents
    with pytest.raises(ValueError, match="EulerDiscreteScheduler's states alone"):
        ours.scale_model_input(ours.sigmas[0], ours.timesteps[0])


def test_a_model_that_is_no_flow_is_refused_by_key() -> None:
    """Cosmos writes its range into a flow's config; the complaint was of a grid."""
    scheduler = extras.cosmos("Cosmos2TextToImage").scheduler
    with pytest.raises(ValueError, match="sigma_max is 80"):
        DLMSScheduler.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_the_data_prediction_is_item_one(kind: str) -> None:
    """Distilled PixArt takes it as its result; it was an IndexError."""
    theirs = diffusers.DDIMScheduler(clip_sample=False) if kind == "vp" else images.flow(shift=3.0)
    ours = DLMSScheduler.from_config(theirs.config, solver="unipc")
    ours.set_timesteps(3)
    x, f = numbers(1), numbers(2)
    t = ours.timesteps[0]
    result = ours.step(f, t, x, return_dict=False)
    assert len(result) == 1 and not isinstance(result, list)
    if kind == "vp":
        bar = theirs.alphas_cumprod[int(t)]
        expected = (x - (1 - bar).sqrt() * f) / bar.sqrt()
    else:
        expected = x - ours.sigmas[0] * f
    torch.testing.assert_close(result[1], expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_that_reads_it_stays_step_by_step() -> None:
    """The loop has no predictions of its own; a recorded loop returned one of stand-ins."""
    make, inputs = CASES["PixArtAlphaPipeline"]
    pipe = make()
    asked = {**inputs(), "num_inference_steps": 1}
    acceleration = accelerate(pipe, solver="ddim")
    outputs = [output_of(pipe, asked | {"generator": images.generator()}) for _ in range(3)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert "data prediction" in acceleration.report().reason


def test_latents_of_another_shape_begin_a_new_history(caplog: Any) -> None:
    """ChronoEdit drops frames in the loop: the rows then read a history that was never written."""

    def run(change: bool) -> torch.Tensor:
        scheduler = DLMSScheduler(solver="unipc")
        scheduler.set_timesteps(4)
        begin, x = 0 if change else 2, numbers(9)
        if not change:
            scheduler.set_begin_index(2)
        for n in range(begin, 4):
            x = numbers(n, 1, 4, 2, 2) if n == 2 else x
            f = numbers(10 + n, *x.shape)
            x = scheduler.step(f, scheduler.timesteps[n], x, return_dict=False)[0]
        return x

    with caplog.at_level(logging.WARNING, "dlms_engine"):
        changed = run(True)
    assert "begins anew at step 2" in caplog.text
    assert torch.equal(changed, run(False))
    assert len(DLMSScheduler().model_outputs) == 0 and DLMSScheduler().last_sample is None


def test_a_shape_that_goes_unseen_is_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    monkeypatch.setattr(runner.State, "fits", lambda self, sample: True)
    with pytest.raises((AssertionError, RuntimeError)):
        test_latents_of_another_shape_begin_a_new_history(_NoCapture())


class _NoCapture:
    text = "begins anew at step 2"

    def at_level(self, *_: Any) -> Any:
        import contextlib

        return contextlib.nullcontext()


def test_pipelines_own_defaults_hold_where_the_config_has_none() -> None:
    """HiDream and others read base_shift with defaults of their own; ours hid them."""
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    ours = DLMSScheduler.from_config(theirs.config, solver="unipc")
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        assert ours.config.get(key, "own") == theirs.config.get(key, "own")
    flow = images.flow(base_shift=0.25, max_shift=0.75)
    assert DLMSScheduler.from_config(flow.config).config.get("base_shift") == 0.25
    assert ours.config.stochastic_sampling is False
    with pytest.raises(ValueError, match="stochastic_sampling is True"):
        DLMSScheduler(stochastic_sampling=True)
