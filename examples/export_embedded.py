"""Export a training run as the files of a model.

    python examples/export_embedded.py --run runs/embedded --features runs/features \\
        --grid docs/images/embedded_samples.png
    python examples/export_embedded.py --preset cifar10-32 --run runs/cifar10-32 \\
        --features runs/features-32

Reads ``checkpoint.safetensors`` of ``train_embedded.py`` (its EMA weights, rounded to bfloat16; the
map of the augmentation labels is left out, which is what zero labels are) and the files of
``train_features.py``. Writes the embedded model into the package and any other into
``benchmarks/models/PRESET/``, with a grid of samples drawn by the exported, rounded model.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
from edm_network import C_NOISE_SCALE, SIGMA_DATA, build_network, sample_grid
from recipes import TRAINING
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from training_state import stored_state

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", WEIGHTS, "features.safetensors", "reference.safetensors")
SHARE = 40 * 10**6
"""Bytes that a model's files may take together."""
OLDER = {"layers": 1, "attention": "", "groups": 8, "head": 64, "augment": 0.0}
OLDER["hardware"] = "not recorded"
"""What runs had that do not say it."""


def assets(preset: str) -> Path:
    if preset == "embedded":
        return ROOT / "python" / "dlms_engine" / "models" / "assets" / "embedded"
    return ROOT / "benchmarks" / "models" / preset


def commit() -> str | None:
    """This checkout's commit; ``DLMS_COMMIT`` where the code is a copy without its history."""
    if "DLMS_COMMIT" in os.environ:
        return os.environ["DLMS_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def averaged(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The EMA weights in bfloat16, without the map of the labels."""
    with safe_open(checkpoint, "pt") as handle:
        return {
            key.removeprefix("ema."): handle.get_tensor(key).bfloat16()
            for key in handle.keys()  # noqa: SIM118 - a safe_open handle is not iterable
            if key.startswith("ema.") and not key.startswith("ema.augment.")
        }


def provenance(
    state: dict[str, Any], facts: dict[str, Any], network: nn.Module, preset: str, note: str
) -> dict[str, Any]:
    size = state["size"]
    reduced = "" if size == 32 else f", box-averaged from 32x32 to {size}x{size}"
    # Mean of the last 10 records of 100 batches each: one record is noisy.
    losses = [loss for _, loss in state["history"][-10:]]
    return {
        "data": {
            "name": "CIFAR-10",
            "source": "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
            "images": f"the {facts['reference_images']:,} training images{reduced}, in [-1, 1]",
            "note": note,
        },
        "model": {
            "preset": preset,
            "architecture": "diffusers UNet2DModel, EDM preconditioning, unconditional",
            "sigma_data": SIGMA_DATA,
            "c_noise_scale": C_NOISE_SCALE,
            "parameters": sum(p.numel() for p in network.parameters()),
            "images_seen": state["step"] * state["batch"],
            "images_budget": state["images"],
            "batch": state["batch"],
            "learning_rate": state["lr"],
            "augmentation": state["augment"],
            "seed": state["seed"],
            "final_loss": sum(losses) / max(1, len(losses)),
            "training_seconds": round(state["seconds"]),
            "weights": "exponential moving average, bfloat16",
        },
        "features": {**facts, "network": type_of_features(preset)},
        "hardware": state["hardware"],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def type_of_features(preset: str) -> str:
    if preset == "embedded":
        return "dlms_engine.models.embedded.FeatureNetwork"
    return "dlms_engine.models.features.ResidualFeatures"


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the files; the provenance.

    Raises:
        ValueError: they are larger than a model may be.
    """
    folder = args.assets or assets(args.preset)
    grid = args.grid or (folder / "samples.png" if args.preset != "embedded" else None)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.run / "checkpoint.safetensors"
    state = OLDER | stored_state(checkpoint)
    weights = averaged(checkpoint)
    network: Any = build_network(state)  # also a diffusers ModelMixin
    network.load_state_dict(weights)
    network.save_config(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    for name in ("features.safetensors", "reference.safetensors"):
        shutil.copyfile(args.features / name, folder / name)
    facts = json.loads((args.features / "facts.json").read_text(encoding="utf-8"))
    held = provenance(state, facts, network, args.preset, args.data_note)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sample_grid(network.to(device), grid, state["size"], 10, 18, seed=1)
    digests = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in FILES}
    held["sha256"] = digests
    text = json.dumps(held, indent=2) + "\n"
    (folder / "provenance.json").write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone
    together = sum(path.stat().st_size for path in folder.iterdir())
    if together > SHARE:
        raise ValueError(f"{folder} holds {together:,} bytes, at most {SHARE:,} may be stored")
    return held


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(TRAINING), default="embedded")
    parser.add_argument("--run", type=Path, required=True, help="folder of train_embedded.py")
    parser.add_argument("--features", type=Path, required=True, help="folder of train_features.py")
    parser.add_argument("--assets", type=Path, help="folder to write instead of the preset's own")
    parser.add_argument("--grid", type=Path, help="PNG of 100 samples of the exported model")
    parser.add_argument(
        "--data-note",
        default="read from lossy JPEG copies; no image is part of this project",
        help="what else there is to say of the data",
    )
    return parser.parse_args(given)


if __name__ == "__main__":
    print(json.dumps(export(arguments()), indent=2))
