"""Every pipeline x (own scheduler, DLMSScheduler, accelerate): equal, or step by step with a reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
sys.path.insert(0, str(Path(__file__).parent))
import cells
from cells import CASES, CLOSE, relative, row
from table import PAGE, verdicts

from dlms_engine.integrations.pipelines import dry_run, recording

pytestmark = pytest.mark.filterwarnings("ignore")
# one of every kind of loop for each run of the tests; all of them with -m slow
QUICK = (
    "StableDiffusionPipeline", "StableDiffusionPipeline, rescaled", "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionInstructPix2PixPipeline",
    "FluxKontextPipeline", "PixArtAlphaPipeline", "CogView4Pipeline", "ChromaPipeline",
    "ZImagePipeline", "Lumina2Pipeline, truncated guidance", "QwenImagePipeline, true guidance",
    "WanPipeline", "WanPipeline, two networks", "WanImageToVideoPipeline", "MochiPipeline",
    "StableDiffusionPipeline, DDIM", "StableDiffusionPAGPipeline", "IFPipeline", "CogVideoXPipeline",
    "LatentConsistencyModelPipeline", "StableDiffusionXLModularPipeline",
    "WanModularPipeline, skipped layers",
)  # fmt: skip
NEEDS = {"StableDiffusionPipeline, LoRA": "peft"}


def check(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    found = row(name)
    own = found.reason.startswith("its own scheduler runs")
    assert bool(found.refused) == own  # nothing is refused, or the pipeline's scheduler runs
    if found.same is not None:
        assert found.same < CLOSE
    assert found.accelerated < CLOSE
    assert found.whole_loop or found.reason
    assert verdicts(PAGE.read_text())[name] == found.whole_loop


@pytest.mark.parametrize("name", QUICK)
def test_pipeline(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_every_other_pipeline(name: str) -> None:
    check(name)


def test_the_page_has_every_pipeline() -> None:
    page = verdicts(PAGE.read_text())
    assert list(page) == list(CASES)
    assert len({name.split(",")[0] for name in CASES}) >= 30


def test_a_loop_that_trusts_its_record_is_wrong(monkeypatch: Any) -> None:
    """Planted faults: without the dry run's comparisons, ControlNet's residuals stay those recorded."""
    monkeypatch.setattr(dry_run.DryRun, "_equal", lambda *_: None)
    found = row("StableDiffusionControlNetPipeline")
    # this run's own residuals are taken, which were made of stand-in latents
    assert found.whole_loop and found.accelerated > 100 * CLOSE


def test_a_single_step_is_run_as_it_is(monkeypatch: Any) -> None:
    """There is no second one to show that ControlNet's residuals follow the latents: 0.84 off."""
    monkeypatch.setattr(cells, "STEPS", 1)
    found = row("StableDiffusionControlNetPipeline")
    assert not found.whole_loop and "single step" in found.reason and found.accelerated < CLOSE


def test_a_mix_that_is_not_measured_is_wrong(monkeypatch: Any) -> None:
    """Planted fault: rescaled guidance passes for a linear mix if only the record is looked at."""
    monkeypatch.setattr(dry_run, "misfit", lambda *_: 0.0)
    assert row("StableDiffusionPipeline, rescaled").accelerated > 100 * CLOSE


def test_latents_changed_between_steps_are_noticed(monkeypatch: Any) -> None:
    """Planted fault: an inpainting blend that goes unseen."""
    honest = recording.same
    latents = (1, 4, 8, 8)

    def blind(one: Any, other: Any) -> bool:
        return tuple(getattr(one, "shape", ())) == latents or honest(one, other)

    monkeypatch.setattr(recording, "same", blind)
    monkeypatch.setattr(dry_run.DryRun, "_state", _first_only)
    assert row("StableDiffusionInpaintPipeline").accelerated > 100 * CLOSE


def test_hooks_for_one_call_are_noticed(monkeypatch: Any) -> None:
    """Planted fault: skip-layer guidance without its skipped layers was taken for the loop."""
    monkeypatch.setattr(recording, "situation", lambda _: ())
    found = row("WanModularPipeline, skipped layers")
    assert found.whole_loop and found.accelerated > 100 * CLOSE


def _first_only(self: Any, sample: Any) -> None:
    if self._latents is None:
        self.start = sample.clone()


def test_relative_sees_a_difference() -> None:
    import torch

    assert relative(torch.ones(3), torch.tensor([1.0, 1.0, 1.1])) == pytest.approx(0.1, rel=1e-4)
