"""``accelerate``: same images as the stepwise scheduler, through one loop of the engine."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine import grids, solvers  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines.whole_loop import WholeLoop  # noqa: E402
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZE = {"height": 16, "width": 16}
CASES: dict[str, Any] = {
    "sd": (tiny.sd, lambda: {**tiny.sd_inputs(2), **SIZE}),
    "sd-no-guidance": (tiny.sd, lambda: {**tiny.sd_inputs(), **SIZE, "guidance_scale": 1.0}),
    "sd-img2img": (
        lambda: tiny.sd("Img2Img"),
        lambda: {**tiny.sd_inputs(), "image": IMAGE, "strength": 0.6},
    ),
    "sdxl": (tiny.sdxl, lambda: {**tiny.sdxl_inputs(), **SIZE}),
    "sd3": (tiny.sd3, tiny.sd3_inputs),
    "flux": (tiny.flux, tiny.flux_inputs),
    "unconditional": (
        lambda: tiny.unconditional("DDPM"),
        lambda: {
            "batch_size": 2, "output_type": "np", "generator": torch.Generator().manual_seed(3),
        },
    ),
}  # fmt: skip
STEPS = {"num_inference_steps": 5}


def images(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return torch.as_tensor(pipe(**inputs).images)


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


def test_the_package_gives_it() -> None:
    """``dlms_engine.accelerate(pipe, solver=...)``, found on first use."""
    import dlms_engine

    assert dlms_engine.accelerate is accelerate and "accelerate" in dlms_engine.__all__
    pipe = tiny.unconditional("DDPM")
    original = pipe.scheduler
    dlms_engine.accelerate(pipe, solver="ddim").undo()
    assert pipe.scheduler is original


class Counter:
    """Batch sizes of the network's real evaluations."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("case", CASES)
def test_same_images_as_the_scheduler(case: str) -> None:
    make, inputs = CASES[case]
    pipe = make()
    original, kind = pipe.scheduler, type(pipe)
    signature = inspect.signature(pipe.__call__)
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver="unipc")
    expected = images(pipe, {**inputs(), **STEPS})
    pipe.scheduler = original
    plain = images(pipe, {**inputs(), **STEPS})
    network = getattr(pipe, "unet", None) or pipe.transformer
    acceleration = accelerate(pipe, solver="unipc")
    assert inspect.signature(pipe.__call__) == signature and isinstance(pipe, kind)
    inner = Counter(next(m for m in network.modules() if isinstance(m, torch.nn.Linear)))
    recorded = images(pipe, {**inputs(), **STEPS})
    assert relative(expected, recorded) < 2e-5
    calls, inner.calls = inner.calls, 0
    report = acceleration.report()
    assert report.whole_loop and report.reason == "" and "whole loop" in repr(acceleration)
    found = images(pipe, {**inputs(), **STEPS})
    assert relative(expected, found) < 2e-6
    assert inner.calls == calls  # the dry run is no evaluation
    assert torch.equal(images(pipe, {**inputs(), **STEPS}), found)
    acceleration.undo()
    assert type(pipe) is kind and pipe.scheduler is original
    assert torch.equal(images(pipe, {**inputs(), **STEPS}), plain)


def test_callbacks_and_masks_run_step_by_step() -> None:
    pipe = tiny.sd()
    accelerate(pipe, solver="unipc")
    for _ in range(2):
        expected = images(pipe, {**tiny.sd_inputs(), **SIZE, **STEPS})
    seen: list[int] = []

    def callback(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return tensors

    stepped = images(pipe, {**tiny.sd_inputs(), **SIZE, **STEPS, "callback_on_step_end": callback})
    assert seen == [0, 1, 2, 3, 4]
    assert relative(expected, stepped) < 2e-5
    rescaled = images(pipe, {**tiny.sd_inputs(), **SIZE, **STEPS, "guidance_rescale": 0.7})
    pipe = tiny.sd()
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")
    asked = {**tiny.sd_inputs(), **SIZE, **STEPS, "guidance_rescale": 0.7}
    assert relative(images(pipe, asked), rescaled) < 2e-5
    assert relative(expected, rescaled) > 1e-3


def test_an_unknown_mixture_is_noticed_and_run_step_by_step() -> None:
    """A pipeline that changes the prediction behind our back, e.g. DiT's shared halves."""
    pipe = tiny.dit()
    inputs = {"class_labels": [1, 2], "num_inference_steps": 4, "output_type": "np"}

    def run() -> torch.Tensor:
        return images(pipe, {**inputs, "generator": torch.Generator().manual_seed(0)})

    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver="unipc")
    expected = run()
    pipe.scheduler = original
    accelerate(pipe, solver="unipc")
    assert relative(expected, run()) < 2e-5


def test_bfloat16_pipeline_keeps_its_dtype_and_guidance(monkeypatch: Any) -> None:
    pipe = tiny.sd().to(torch.bfloat16)
    accelerate(pipe, solver="dpm_solver_pp")
    inputs = {**tiny.sd_inputs(), **SIZE, **STEPS, "guidance_scale": 7.3}
    inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    weights: list[list[float]] = []
    mixing = WholeLoop.__init__

    def remember(loop: WholeLoop, *args: Any) -> None:
        mixing(loop, *args)
        weights.extend(loop.weights.tolist())

    monkeypatch.setattr(WholeLoop, "__init__", remember)
    expected = images(pipe, inputs)
    out = images(pipe, {**inputs, "generator": torch.Generator().manual_seed(3)})
    assert out.dtype == torch.bfloat16 and relative(expected.float(), out.float()) < 2e-2
    assert weights == [[1 - 7.3, 7.3, 0.0]] * 5  # not the rounded 7.28 that bfloat16 shows


def test_analytical_first_step_works_where_pipelines_do_not_scale() -> None:
    pipe = tiny.unconditional("DDIM")
    process = DLMSScheduler.from_config(pipe.scheduler.config).noise_model.process
    table = solvers.ddim(process, grids.time_uniform(process, 5), afs=True)
    acceleration = accelerate(pipe, solver=table)
    outs = []
    for _ in range(2):  # recorded, then in the engine's loop
        generator = torch.Generator().manual_seed(0)
        asked = {"batch_size": 1, "num_inference_steps": 4, "output_type": "np"}
        outs.append(torch.as_tensor(pipe(**asked, generator=generator).images))
    assert acceleration.report().whole_loop
    assert bool(outs[0].isfinite().all()) and relative(*outs) < 2e-6


def test_a_replaced_scheduler_is_respected_and_undo_keeps_other_hooks() -> None:
    pipe = tiny.sd()
    original = pipe.scheduler
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # an offloading hook, say
    hooked = pipe.unet.forward
    expected = images(pipe, {**tiny.sd_inputs(), **SIZE, **STEPS})
    acceleration = accelerate(pipe, solver="unipc")
    pipe.scheduler = original
    assert torch.equal(images(pipe, {**tiny.sd_inputs(), **SIZE, **STEPS}), expected)
    acceleration.undo()
    assert pipe.unet.forward is hooked


def test_a_per_sample_solver_watches_the_network() -> None:
    pipe = tiny.sd()
    process = DLMSScheduler.from_config(pipe.scheduler.config).noise_model.process
    settings = DesignerSettings(steps=3, order=2, afs=False, features=16, coordinate="linear")
    weights = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        designer = Designer(settings, process, grids.time_uniform(process, 3), weights)
        torch.nn.init.normal_(designer.head.weight, std=0.3)
    policy = DesignerPolicy(designer)
    asked = {**SIZE, "num_inference_steps": 3}
    acceleration = accelerate(pipe, solver=policy)
    found = images(pipe, {**tiny.sd_inputs(), **asked})
    acceleration.undo()
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=policy)
    pipe.scheduler.watch(pipe.unet)
    assert torch.equal(images(pipe, {**tiny.sd_inputs(), **asked}), found)
    pipe.scheduler._watch._handles[0].remove()  # planted fault: the bottleneck is not seen
    with pytest.raises(RuntimeError, match="not called before step"):
        images(pipe, {**tiny.sd_inputs(), **asked})
