"""Models in folders: exported from delivered files, read back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlms_engine import models
from dlms_engine.models import pretrained
from dlms_engine.models.features import ResidualFeatures
from dlms_engine.models.unet import UNet
from dlms_engine.processes import EDM, RectifiedFlow

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["face", "heart", "flag"]
NETWORK: dict[str, Any] = {
    "size": 8, "channels": [4, 8], "layers": 1, "attention": [1], "patch": 1, "head": 4,
    "groups": 4, "classes": 3,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "emoji": {"prediction": "edm", "sigma_data": 0.8, "batch": 4, "lr": 1e-3, "guidance": 2.0},
    "emoji-flow": {"prediction": "flow", "batch": 4, "lr": 1e-3, "guidance": 2.0},
}


def deliver(folder: Path, name: str, *, steps: tuple[int, ...] = (7,), parts: int = 1) -> UNet:
    """The files that ``timed_training.py`` writes, one for each of ``steps``."""
    torch.manual_seed(len(name))
    network = UNet(**NETWORK)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = sorted(network.state_dict().items())
    for part, step in enumerate(steps):
        facts = {
            "model": name, "recipe": RECIPES[name], "seed": 0, "classes": CLASSES,
            "config": NETWORK, "step": step, "images_seen": 4 * step, "parameters": 1,
            "seconds": 2.0, "loss": 0.5, "learning_rate": 0.0, "hardware": "a test", "torch": "x",
            "part": part, "parts": parts,
        }  # fmt: skip
        mine = {k: v.bfloat16() for k, v in weights[part :: len(steps)]}
        suffix = f".{part}" if parts > 1 else ""
        save_file(mine, folder / f"{name}{suffix}.safetensors", {"training": json.dumps(facts)})
    return network


def deliver_features(folder: Path) -> None:
    weights = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in ResidualFeatures((4, 8)).state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    weights["reference.count"] = torch.tensor([30])
    weights["reference.mean"] = torch.zeros(8, dtype=torch.float64)
    weights["reference.covariance"] = torch.eye(8, dtype=torch.float64)
    facts = {"test_accuracy": 0.9, "test_images": 10, "classes": CLASSES, "reference_images": 30}
    metadata = {"widths": "4,8", "facts": json.dumps(facts)}
    save_file(weights, folder / "emoji-features.safetensors", metadata)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import export_models

    return export_models


def test_both_kinds_come_back_as_they_were_trained(exporter: Any, tmp_path: Path) -> None:
    networks = {name: deliver(tmp_path, name) for name in RECIPES}
    deliver_features(tmp_path)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    for name, network in networks.items():
        folder = exporter.export(tmp_path, name, tmp_path / "root")
        model = pretrained.read(folder)
        kind, process = (EDM, "edm") if name == "emoji" else (RectifiedFlow, "flow")
        assert isinstance(model.denoiser.process, kind)
        assert model.denoiser.prediction == process
        assert model.shape == (3, 8, 8) and model.classes == tuple(CLASSES)
        assert torch.equal(model.labels("flag", "face"), torch.tensor([2, 0]))
        elsewhere = pretrained.read(folder, "meta").labels("flag")
        assert elsewhere.device.type == "meta", "the network's device"
        rounded = network.bfloat16().float()
        raw = model.denoiser.network_output(x, torch.tensor(0.3), class_labels=labels)
        torch.testing.assert_close(raw, rounded(x, torch.full((2,), 0.3), labels))
        assert model.features(x).shape == (2, 8) and model.reference.images == 30
        record = json.loads((folder / "provenance.json").read_text())
        assert "Apache-2.0" in record["data"]["licence"]
        assert "Apache-2.0" in (folder / "MODEL_CARD.md").read_text()
        assert "network.safetensors" in record["sha256"]
    flow = tmp_path / "root" / "python" / "dlms_engine" / "models" / "assets" / "emoji-flow"
    assert not (flow / "features.safetensors").exists()  # kept once, beside the other model


def test_guidance_needs_no_more_than_a_scale(exporter: Any, tmp_path: Path) -> None:
    deliver(tmp_path, "emoji")
    deliver_features(tmp_path)
    folder = exporter.export(tmp_path, "emoji", tmp_path / "root")
    plain, guided = pretrained.read(folder), pretrained.read(folder, guidance_scale=3.0)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    with_class = plain.denoiser(x, 1.0, class_labels=labels)
    without = plain.denoiser(x, 1.0)
    expected = without + 3 * (with_class - without)
    found = guided.denoiser(x, 1.0, class_labels=labels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(with_class, without)


def test_parts_of_two_deliveries_are_no_model(exporter: Any, tmp_path: Path) -> None:
    deliver_features(tmp_path)
    deliver(tmp_path, "emoji", steps=(7, 7), parts=2)
    assert exporter.export(tmp_path, "emoji", tmp_path / "root") is not None
    deliver(tmp_path, "emoji", steps=(7, 8), parts=2)
    with pytest.raises(ValueError, match=r"steps \[7, 8\] are not one model"):
        exporter.export(tmp_path, "emoji", tmp_path / "root")
    (tmp_path / "emoji.1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"parts \[0\]"):
        exporter.export(tmp_path, "emoji", tmp_path / "root")
    assert exporter.export(tmp_path, "emoji-flow", tmp_path / "root") is None


def test_what_does_not_fit_is_refused(exporter: Any, tmp_path: Path) -> None:
    deliver(tmp_path, "emoji")
    deliver_features(tmp_path)
    folder = exporter.export(tmp_path, "emoji", tmp_path / "root")
    with pytest.raises(ValueError, match="classes \\['frog'\\] are not among face"):
        pretrained.read(folder).labels("frog")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scale": 2}))
    with pytest.raises(ValueError, match=r"has \['scale'\]"):
        pretrained.read(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "network.safetensors")
    del weights["conv_in.weight"]
    save_file(weights, folder / "network.safetensors")
    with pytest.raises(ValueError, match=r"missing \['conv_in.weight'\]"):
        pretrained.read(folder)
    with pytest.raises(ValueError, match="expected one of emoji, emoji-flow"):
        models.load("emojis")
