"""What is kept in a folder for a later distillation, and what it is kept for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
import extras  # noqa: E402
import images as cases  # noqa: E402

from dlms_engine.integrations.pipelines.denoiser import (  # noqa: E402
    PipelineDenoiser,
    pipeline_denoiser,
)
from dlms_engine.integrations.pipelines.prompt_calls import _fingerprint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_exact_latents_are_of_one_noise_model(tmp_path: Any) -> None:
    """A scheduler's config was corrected, and the exact latents of the wrong one were used again."""
    pipe = tiny.unconditional("DDIM")
    solved: list[int] = []

    def kept(**changes: Any) -> None:
        pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, **changes)
        denoiser, shape = pipeline_denoiser(pipe, folder=tmp_path, batch_size=1)
        noise = torch.zeros(1, *shape)
        denoiser.kept_solution(noise, 8, lambda: solved.append(1) or 2 * noise)

    for count, changes in enumerate(
        ({}, {"prediction_type": "v_prediction"}, {"beta_end": 0.012}), start=1
    ):
        kept(**changes)
        assert len(solved) == count
    kept()
    assert len(solved) == 3  # and the first one is still there


def scales(folder: Any) -> list[float]:
    """The exact latents of a network whose adapter has another scale in each of three distillations."""
    pipe, found = extras.lora(), []
    given = {k: v for k, v in tiny.sd_inputs().items() if k.endswith("embeds")}
    for scale in (1.0, 0.2, 0.2):
        pipe.unet.set_adapters(["default"], [scale])
        denoiser, shape = pipeline_denoiser(
            pipe, guidance_scale=3.0, folder=folder, **given, **cases.SIZE
        )
        noise, number = torch.ones(2, *shape), float(len(found))
        exact = denoiser.kept_solution(noise, 8, lambda n=noise, k=number: k * n)
        found.append(float(exact.mean()))
    return found


def test_exact_latents_are_of_one_adapters_scale(tmp_path: Any) -> None:
    """It is no weight: the latents of another scale were used again."""
    pytest.importorskip("peft")
    assert scales(tmp_path) == [0.0, 1.0, 1.0]


def test_a_network_that_answers_otherwise_is_seen(tmp_path: Any, monkeypatch: Any) -> None:
    """Planted fault."""
    pytest.importorskip("peft")
    monkeypatch.setattr(PipelineDenoiser, "_same", lambda *_: True)
    assert scales(tmp_path) == [0.0, 0.0, 0.0]


def images() -> dict[str, Any]:
    image = pytest.importorskip("PIL.Image")
    array = np.zeros((64, 64, 3), dtype=np.uint8)
    return {
        "array": array,
        "list of tensors": [torch.zeros(64, 64)],
        "picture": image.fromarray(array),
    }


@pytest.mark.parametrize("kind", ["array", "list of tensors", "picture"])
def test_prompts_are_kept_for_one_image(kind: str) -> None:
    """The middle of an array is not in its ``repr``: another image had the first one's latents."""
    pipe = SimpleNamespace(components={})
    one, same, other = images()[kind], images()[kind], images()[kind]
    if kind == "picture":
        other.putpixel((32, 32), (1, 1, 1))
    else:
        (other[0] if kind == "list of tensors" else other)[32, 32] = 1
    keys = [_fingerprint(pipe, {"image": image}) for image in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_images_are_kept_for_their_encoder() -> None:
    keys = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        keys.append(_fingerprint(SimpleNamespace(components={"vae": torch.nn.Linear(2, 2)}), {}))
    assert keys[0] == keys[1] != keys[2]
