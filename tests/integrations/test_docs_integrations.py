"""The examples in docs/integrations run as they stand, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "integrations"


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Executes a page's Python blocks in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.S)
    assert blocks, f"{page} has no example"
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
def test_diffusers_page(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
    pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
    import tiny_pipelines as tiny

    monkeypatch.chdir(tmp_path)
    inputs = {**tiny.sd_inputs(), "height": 16, "width": 16}
    del inputs["guidance_scale"], inputs["generator"]
    settings = {
        "method": "dlms",
        "trajectories": 2, "batch": 2, "validation_samples": 2, "validation_steps": 4,
        "validate_every": 0, "progress": False,
    }  # fmt: skip
    names = run("diffusers.md", {"pipe": tiny.sd(), "inputs": inputs, "settings": settings})
    assert bool(torch.as_tensor(names["image"]).isfinite().all())


def test_k_diffusion_page() -> None:
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    names = run("k_diffusion.md", {"model": model, "noise": noise})
    assert names["x"].std() < 2


def test_edm_page(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from safetensors.torch import save_file

    from dlms_engine.checkpoints.networks import SongUNet

    monkeypatch.chdir(tmp_path)
    settings = {
        "img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8,
        "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
    }  # fmt: skip
    described = {
        "kind": "SongUNet", "settings": settings, "sigma_min": 0.002, "sigma_max": 80.0,
        "sigma_data": 0.5,
    }  # fmt: skip
    metadata = {"format": "dlms_engine.edm/1", "snapshot": json.dumps(described)}
    save_file(SongUNet(**settings).state_dict(), "tiny.safetensors", metadata)
    names = run("edm.md", {"snapshot": "tiny.safetensors", "shape": (3, 8, 8)})
    assert names["images"].shape == (4, 3, 8, 8)
    assert (tmp_path / "snapshot.safetensors").exists()


def test_comfyui_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    import comfy_standin

    comfy_standin.install(monkeypatch)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    model = comfy_standin.Model(comfy_standin.EpsSampling(), denoise)
    steps: list[int] = []
    names = run(
        "comfyui.md",
        {
            "model": model,
            "denoiser": model,
            "noise": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
            "callback": lambda i, *_: steps.append(i),
        },
    )
    assert names["latents"].std() < 2 and steps == list(range(6))
    workflow = re.findall(r"```json\n(.*?)```", (DOCS / "comfyui.md").read_text(), flags=re.S)[0]
    from dlms_engine.integrations.comfyui import NODE_CLASS_MAPPINGS

    for node in json.loads(workflow).values():
        kind = NODE_CLASS_MAPPINGS.get(node["class_type"])
        if kind is not None:
            asked = kind.INPUT_TYPES()
            assert set(node["inputs"]) == {*asked["required"], *asked["optional"]}


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own files, narrower: what it passes must fit weights of the published layout."""
    pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
    pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
    import tiny_pipelines as tiny
    from guided_reference import random_state
    from ldm_keys import ldm_state

    monkeypatch.chdir(tmp_path)
    flags = {
        "in_channels": 3, "model_channels": 64, "out_channels": 6, "num_res_blocks": 1,
        "attention_resolutions": [2], "channel_mult": [1, 2], "num_classes": 5,
        "use_scale_shift_norm": True, "resblock_updown": True,
    }  # fmt: skip
    noisy = {**flags, "out_channels": 5, "num_classes": None, "pool": "attention", "image_size": 8}
    torch.save(random_state(flags), "64x64_diffusion.pt")
    torch.save(random_state(noisy), "64x64_classifier.pt")
    edm = {**flags, "out_channels": 3, "attention_dims": 2}
    torch.save(random_state(edm), "edm_imagenet64_ema.pt")
    pipe = tiny.sd(text=tiny.clip(tmp_path / "words"))
    pipe.save_pretrained("stable-diffusion-folder")
    torch.save({"state_dict": ldm_state(pipe)}, "model.ckpt")
    parts = {
        "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "safety_checker": None,
        "feature_extractor": None, "scheduler": pipe.scheduler,
    }  # fmt: skip
    names = run(
        "checkpoints.md",
        {
            "shape": (3, 8, 8),
            "labels": torch.tensor([1, 4]),
            "parts": parts,
            "size": {"height": 16, "width": 16, "output_type": "np"},
        },
    )
    assert bool(names["images"].isfinite().all()) and names["image"].shape == (16, 16, 3)
    assert names["denoiser"].prediction == "edm" and (tmp_path / "edm64.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_servers_page(tmp_path: Any) -> None:
    """The contract of two servers: an entry point that loads, and ``set_shift``."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
    from importlib.metadata import entry_points

    if not entry_points(group="vllm_omni.schedulers", name="DLMSScheduler"):
        pytest.skip("this installation is older than the entry point: install it again")
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    names = run("servers.md", {"config": config, "folder": tmp_path})
    served, kind = names["served"], names["kind"]
    assert kind.__name__ == "DLMSScheduler" and served.shift == 5.0


def test_set_shift_is_that_of_diffusers(tmp_path: Any) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
    from dlms_engine.integrations.diffusers import DLMSScheduler

    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    own = DLMSScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, solver="unipc"
    )
    own.set_shift(5.0)
    own.set_timesteps(4)
    reference.set_timesteps(4)
    torch.testing.assert_close(own.sigmas, reference.sigmas, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="flow"):
        DLMSScheduler().set_shift(2.0)


def test_flow_loops_page() -> None:
    """Exact networks of Gaussian data: the sampler ends at the data."""
    std = 0.5

    def policy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(-1, 1, 1)
        data = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * x
        return (x - (1 - t) * data) / t.clamp(min=1e-6) - data

    def speech(x: torch.Tensor, t: torch.Tensor, level: Any = None) -> torch.Tensor:
        return -policy(x, 1 - t) + 0.1 * (level.reshape(-1, 1, 1) if level is not None else 0.0)

    shape = (3, 8, 5)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    names = run(
        "flow_loops.md",
        {
            "policy": policy,
            "speech": speech,
            "action_noise": noise,
            "mel_noise": noise,
            "condition": {"level": torch.ones(3)},
            "unconditional": {"level": torch.zeros(1)},
        },
    )

    def euler(flow: Any, steps: int) -> torch.Tensor:
        x = noise
        for n in range(steps):
            x = x - flow(x, torch.full((3,), 1 - n / steps)) / steps
        return x

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -speech(x, 1 - t, 2.0 * torch.ones(3))

    exact, spoken = euler(policy, 1000), euler(guided, 1000)
    assert (exact - std * noise).abs().max() < 0.01
    error = (names["actions"] - exact).abs().max()
    assert error < 0.75 * (euler(policy, 4) - exact).abs().max()
    assert (names["mel"] - spoken).abs().max() < (euler(guided, 6) - spoken).abs().max()


def test_pipelines_page() -> None:
    """Made by the matrix, whose own test holds each row to it."""
    page = (DOCS / "pipelines.md").read_text(encoding="utf-8")
    assert "```python" not in page and "WanPipeline" in page


def test_published_page() -> None:
    """Its example runs where the files that it reads are written."""
    tests = (DOCS.parents[1] / "tests" / "checkpoints" / "test_published_command.py").read_text()
    assert "\ndef test_the_example_of_the_page(" in tests


def test_every_page_is_run() -> None:
    """A new page needs a test here."""
    tested = {f"test_{page.stem}_page" for page in DOCS.glob("*.md")}
    assert tested <= set(globals()), sorted(tested - set(globals()))
