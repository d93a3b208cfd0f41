"""What ``accelerate`` refuses: wrong settings, and pipelines without a loop of their own."""

from __future__ import annotations

from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine.integrations import diffusers as module  # noqa: E402
from dlms_engine.integrations.diffusers import accelerate  # noqa: E402
from dlms_engine.integrations.pipelines.distill import distill_pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"solver_ordr": 3}, r"no arguments \['solver_ordr'\]"),
    ({"solver_order": 9}, "order is 9"),
    ({"solver_options": {"variant": "bh3"}}, "variant is 'bh3'"),
    ({"prediction_type": "noise"}, "prediction_type is 'noise'"),
    ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
]


class Combined(diffusers.DiffusionPipeline):
    """A pipeline whose loop is another's, as Kandinsky's combined ones."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.register_modules(unet=inner.unet, vae=inner.vae, scheduler=inner.scheduler)
        self.decoder_pipe = inner


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    """The pipeline's own scheduler ran instead, or the setting was ignored."""
    pipe = tiny.sd()
    original = pipe.scheduler
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, solver="unipc", **settings)
    assert pipe.scheduler is original and type(pipe) is diffusers.StableDiffusionPipeline


def test_a_setting_that_is_not_tried_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: without the table of one step the order is looked at in the first call."""
    tried = module._tried
    monkeypatch.setattr(
        module, "_tried", lambda config, _, settings: tried(config, "ddim", settings)
    )
    with pytest.raises(pytest.fail.Exception):
        test_a_wrong_setting_is_refused(*WRONG[1])


def test_a_config_that_is_not_understood_is_no_wrong_setting() -> None:
    pipe = tiny.sd()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    refused = accelerate(pipe, solver="unipc", solver_order=3).report().refused
    assert "algorithm_type is 'sde-dpmsolver++'" in refused


def test_settings_of_flows_with_a_dynamic_shift() -> None:
    acceleration = accelerate(tiny.flux(), solver="unipc", solver_order=3)
    assert not acceleration.report().refused


@pytest.mark.parametrize("use", [accelerate, distill_pipeline])
def test_a_loop_that_is_another_pipelines(use: Any) -> None:
    """Its own scheduler ran, whatever solver was asked for."""
    with pytest.raises(ValueError, match=r"pass pipe\.decoder_pipe"):
        use(Combined(tiny.sd()))


def test_without_a_scheduler() -> None:
    """``'NoneType' object has no attribute 'config'``."""
    pipe = tiny.sd()
    pipe.scheduler = None
    for one in (pipe, pipe.unet, diffusers.FluxAutoBlocks().init_pipeline()):
        with pytest.raises(ValueError, match=f"{type(one).__name__} has no scheduler"):
            accelerate(one)
