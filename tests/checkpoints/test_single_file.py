"""Latent-diffusion files through diffusers' single-file loading, offline."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402
from ldm_keys import ldm_state  # noqa: E402

from dlms_engine.checkpoints.load import load_checkpoint  # noqa: E402
from dlms_engine.checkpoints.restricted import UnsafeCheckpointError  # noqa: E402
from dlms_engine.checkpoints.single_file import load_single_file  # noqa: E402
from dlms_engine.cli import main  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model(tmp_path: Path) -> tuple[Any, Path]:
    """A tiny Stable Diffusion pipeline, and its directory, for the JSON files."""
    pipe = tiny.sd(text=tiny.clip(tmp_path / "words"))
    pipe.save_pretrained(tmp_path / "config")
    return pipe, tmp_path


def image(pipe: Any) -> torch.Tensor:
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")
    asked = {"prompt": "a cat", "height": 16, "width": 16, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**asked, num_inference_steps=3, generator=generator).images)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", "converted"])
def test_a_single_file_is_the_pipeline(
    model: tuple[Any, Path], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same image as the pipeline the weights came from; ``.ckpt`` after ``dlms convert`` too."""
    pipe, folder = model
    state, path = ldm_state(pipe), folder / "model.safetensors"
    if suffix != ".safetensors":
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": state, "global_step": 3}, path)
    if suffix == "converted":
        converted = folder / "converted.safetensors"
        main(["convert", str(path), str(converted), "--json"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "ldm"
        path = converted
    elif suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    parts = {
        "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "safety_checker": None,
        "feature_extractor": None, "scheduler": pipe.scheduler,
    }  # fmt: skip
    loaded = load_single_file(path, config=folder / "config", **parts)
    loaded.set_progress_bar_config(disable=True)
    expected = image(pipe)
    torch.testing.assert_close(image(loaded), expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # planted: a changed weight is seen
        loaded.unet.conv_in.weight.mul_(1.5)
    assert (image(loaded) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="load_single_file"):
        load_checkpoint(path)


def test_refusals(model: tuple[Any, Path]) -> None:
    pipe, folder = model

    class Callback:
        """What training frameworks leave in a .ckpt."""

        def __reduce__(self) -> Any:
            return print, ("executed",)

    (folder / "code.ckpt").write_bytes(pickle.dumps({"state_dict": {}, "callbacks": Callback()}))
    with pytest.raises(UnsafeCheckpointError, match="safetensors"):
        load_single_file(folder / "code.ckpt")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match="not the weights of"):
        load_single_file(folder / "other.safetensors")
    save_file({k: v.contiguous() for k, v in ldm_state(pipe).items()}, folder / "m.safetensors")
    with pytest.raises(ValueError, match="config is"):
        load_single_file(folder / "m.safetensors", config=folder / "missing")
    with pytest.raises(ValueError, match="pipeline is 'NoPipeline'"):
        load_single_file(folder / "m.safetensors", pipeline="NoPipeline")
