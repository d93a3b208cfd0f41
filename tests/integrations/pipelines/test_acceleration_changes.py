"""An accelerated pipeline of which something besides its arguments changes, or that is used otherwise."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
import extras  # noqa: E402
import images  # noqa: E402
import variants  # noqa: E402

from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines import acceleration as module  # noqa: E402
from dlms_engine.integrations.pipelines.interception import Interception  # noqa: E402
from dlms_engine.integrations.pipelines.parts import set_scheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


def asked(**extra: Any) -> dict[str, Any]:
    return {**tiny.sd_inputs(), **images.SIZE, "num_inference_steps": STEPS, **extra}


def both(make: Any, run: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """What ``run`` gives with the scheduler alone and accelerated, and the acceleration."""
    pipe = make()
    config = {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}
    set_scheduler(pipe, DLMSScheduler.from_config(config, solver="unipc"))
    expected, pipe = run(pipe), make()
    acceleration = accelerate(pipe, solver="unipc")
    return expected, run(pipe), acceleration


def same(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() <= 2e-5 * one.abs().max()


def guiders(pipe: Any) -> list[torch.Tensor]:
    """Two runs each with the first guider and another one."""
    found = []
    for scale in (5.0, 2.0):
        pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=scale))
        for _ in range(2):
            found.append(pipe(**extras.modular_sdxl_inputs(), num_inference_steps=STEPS))
    return found


def test_a_modular_pipelines_guider_changes() -> None:
    """The run that noticed it went on with other noise: its generator had not been put back."""
    expected, found, acceleration = both(extras.modular_sdxl, guiders)
    same(expected, found)
    assert acceleration.report().whole_loop  # the changed guider was recorded anew


def test_a_generator_that_is_not_put_back_is_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    monkeypatch.setattr(module, "generators_of", lambda _: [])
    with pytest.raises(AssertionError):
        same(*both(extras.modular_sdxl, guiders)[:2])


def test_what_differs_from_its_record_again_and_again_stays_step_by_step() -> None:
    """Rescaled guidance passes for a linear mix in every record, and is none in any run."""

    def run(pipe: Any) -> list[torch.Tensor]:
        return [pipe(**asked(guidance_rescale=0.7)).images for _ in range(4)]

    expected, found, acceleration = both(tiny.sd, run)
    same(expected, found)
    kind = next(iter(acceleration._kinds.values()))
    assert kind.stepwise and kind.refuted == module.TRIES


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_differs_from_its_record_leaves_the_pipeline_as_it_was(
    fails: bool, monkeypatch: Any
) -> None:
    """Perturbed attention puts its processors back at the end of a call, which was never reached."""

    def run(pipe: Any) -> list[torch.Tensor]:
        found = [pipe(**asked(pag_scale=2.0)).images]
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(module.DryRun, "weights", _differs)
            found += [pipe(**asked(pag_scale=2.0)).images for _ in range(2)]
        return [*found, pipe(**asked(pag_scale=0.0)).images]

    expected, found, acceleration = both(variants.pag, run)
    same(expected, found)
    kind = next(iter(acceleration._kinds.values()))
    assert kind.report.whole_loop != fails


def _differs(_: Any) -> torch.Tensor:
    raise module.NotReplayed("this run is another one")


def test_a_legacy_callback_is_seen() -> None:
    """It came with the other keyword arguments, and was shown the latents of a dry run."""
    seen: list[torch.Tensor] = []

    def run(pipe: Any) -> list[torch.Tensor]:
        seen.clear()
        for _ in range(2):
            pipe(**asked(callback=lambda i, t, x: seen.append(x.clone()), callback_steps=1))
        return list(seen)

    expected, found, acceleration = both(tiny.sd, run)
    assert len(found) == 2 * STEPS
    same(expected, found)
    assert "callback is called during the loop" in acceleration.report().reason


def test_from_pipe_takes_the_components() -> None:
    """Their classes were no longer exactly those that it looks for: it raised."""

    def run(pipe: Any) -> list[torch.Tensor]:
        found = [pipe(**asked()).images]
        other = images.quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
        given = {k: v for k, v in asked(image=images.PICTURE).items() if k not in images.SIZE}
        return [*found, other(**given).images, pipe(**asked()).images]

    same(*both(tiny.sd, run)[:2])


def test_the_class_of_a_module_that_is_listened_to() -> None:
    layer = torch.nn.Linear(2, 2)
    interception = Interception(layer, lambda m, original, args, kwargs: original(*args, **kwargs))
    kind = type(layer)
    assert kind is not torch.nn.Linear and kind == torch.nn.Linear and torch.nn.Linear == kind
    assert hash(kind) == hash(torch.nn.Linear) and kind in {torch.nn.Linear: 0}
    assert kind != torch.nn.Conv2d and isinstance(layer, torch.nn.Linear)
    interception.remove()


def test_pickles_are_of_the_original_classes() -> None:
    """pickle and torch.save refused the pipeline and its parts: the class was not the object's own."""
    pipe = tiny.sd()
    accelerate(pipe, solver="unipc")
    expected = pipe(**asked()).images
    other = pickle.loads(pickle.dumps(pipe))
    assert type(other) is diffusers.StableDiffusionPipeline
    assert type(other.unet) is diffusers.UNet2DConditionModel
    same([expected], [other(**asked()).images])


def test_under_inference_mode_the_loop_is_the_engines() -> None:
    """Its tensors have no versions: the loop failed, and every run went step by step."""

    def run(pipe: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [pipe(**asked()).images.clone() for _ in range(3)]

    expected, found, acceleration = both(tiny.sd, run)
    same(expected, found)
    assert acceleration.report().whole_loop, acceleration.report()


def test_a_float64_pipeline_runs_in_the_loop() -> None:
    """Scalar products cannot show a misfit of a few float64 roundings: no mix was linear."""

    def run(pipe: Any) -> list[torch.Tensor]:
        pipe.to(torch.float64)
        given = asked()
        given |= {k: v.double() for k, v in given.items() if isinstance(v, torch.Tensor)}
        return [pipe(**{**given, "generator": images.generator()}).images for _ in range(3)]

    expected, found, acceleration = both(tiny.sd, run)
    same(expected, found)
    assert acceleration.report().whole_loop, acceleration.report()


def fast_free_init(pipe: Any) -> list[torch.Tensor]:
    """Three passes over the noise; the first ones have fewer steps."""
    pipe.enable_free_init(num_iters=3, use_fast_sampling=True)
    return [torch.as_tensor(pipe(**asked(num_frames=3)).frames) for _ in range(3)]


def test_passes_of_fewer_steps_are_all_run() -> None:
    """The last pass alone was proven; the others' latents were the dry run's stand-ins."""
    expected, found, acceleration = both(variants.animatediff, fast_free_init)
    same(expected, found)
    assert "fewer steps than the last one" in acceleration.report().reason


def test_a_pass_that_is_not_run_is_seen(monkeypatch: Any) -> None:
    """Planted fault."""
    monkeypatch.setattr(module.DryRun, "fail", lambda *_: None)
    with pytest.raises(AssertionError):
        same(*both(variants.animatediff, fast_free_init)[:2])
