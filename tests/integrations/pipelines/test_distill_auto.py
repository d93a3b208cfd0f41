"""``auto``, the default for pipelines: its cost is said first, and the pipeline can run what it finds."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402
from commands import run  # noqa: E402

from dlms_engine.engine.sampler import Sampler  # noqa: E402
from dlms_engine.integrations.pipelines import distill  # noqa: E402
from dlms_engine.learners.auto import AutoSettings  # noqa: E402
from dlms_engine.learners.auto.table import GeneralTable  # noqa: E402
from dlms_engine.learners.start import handcrafted_candidates  # noqa: E402
from dlms_engine.processes import RectifiedFlow, VPDiscrete  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_it_is_the_default(capsys: Any) -> None:
    """It was dlms, unlike that of every other distillation."""
    default = inspect.signature(distill.distill_pipeline).parameters["method"].default
    assert default == "auto"
    assert run("distill", "--pipeline", "x", "--show-config", "--json") == 0
    assert json.loads(capsys.readouterr().out)["method"] == "auto"


@pytest.mark.parametrize(("seconds", "more"), [(0.001, False), (5.0, True)])
def test_what_the_budget_holds_is_said(seconds: float, more: bool, monkeypatch: Any) -> None:
    """Ten minutes are 600,000 evaluations of a small network, and 120 of a large one."""
    monkeypatch.setattr(distill, "seconds_of_one", lambda _: seconds)
    pipe = tiny.sd3()
    asked = {k: v for k, v in tiny.sd3_inputs().items() if k != "generator"}
    denoiser, shape = distill.pipeline_denoiser(pipe, **asked)
    line = distill.budget_line(denoiser, shape, AutoSettings(4))
    assert f"{600 / seconds:,.0f}" in line
    assert ("nothing will be trained" in line) == more
    assert ("where a few samples hold the error" in line) == (not more)


def test_nothing_rescales_the_first_input_where_the_pipeline_cannot() -> None:
    process = VPDiscrete(alphas_cumprod=torch.linspace(0.999, 0.01, 100).tolist())
    every = handcrafted_candidates(process, 4)
    plain = handcrafted_candidates(process, 4, afs=False)
    assert any("afs" in c.label for c in every) and not any("afs" in c.label for c in plain)
    base = handcrafted_candidates(RectifiedFlow(), 3)[0]
    form = GeneralTable(base, scaled=False)
    assert form.groups["scale"] == slice(form.size, form.size)
    moved = form.table(torch.full((form.size,), 1e-3, dtype=torch.float64))
    assert moved is not None and float(moved.initial_scale) == 1.0
    scaled = GeneralTable(base)  # planted: with its scale it is not one
    moved = scaled.table(torch.full((scaled.size,), 1e-3, dtype=torch.float64))
    assert moved is not None and float(moved.initial_scale) != 1.0


@pytest.mark.slow
def test_a_flow_is_distilled_and_runs_step_by_step(capsys: Any) -> None:
    """SD3 does not scale its input: what was found runs there and is better than its base."""
    pipe = tiny.sd3()
    unasked = ("generator", "guidance_scale")
    asked = {k: v for k, v in tiny.sd3_inputs(2).items() if k not in unasked}
    scheduler = distill.distill_pipeline(
        pipe,
        nfe=3,
        guidance_scale=tiny.GUIDANCE,
        pipeline_arguments=asked,
        budget="20k",
        held_out=16,
    )
    assert capsys.readouterr().out.startswith("one evaluation of one sample takes")
    assert scheduler.solver.best["report"]["ratio"] > 1
    denoiser, shape = distill.pipeline_denoiser(pipe, **asked, guidance_scale=tiny.GUIDANCE)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    pipe.scheduler = scheduler
    call = {**asked, "guidance_scale": tiny.GUIDANCE, "latents": noise, "num_inference_steps": 3}
    found, expected = pipe(**call).images, Sampler(denoiser, scheduler.solver)(noise)
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
