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

    from dlms_engine.integrations.networks import SongUNet

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
