"""Export a training run as the files of the embedded model.

    python examples/export_embedded.py --run runs/embedded --features runs/features \\
        --grid docs/images/embedded_samples.png

Reads ``checkpoint.safetensors`` of ``train_embedded.py`` (its EMA weights, rounded to bfloat16) and
the files of ``train_features.py``; writes ``python/dlms_engine/assets/embedded/`` and a grid of
samples drawn by the exported, rounded model.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from train_embedded import C_NOISE_SCALE, SIGMA_DATA, build_network, sample_grid

ASSETS = Path(__file__).resolve().parent.parent / "python" / "dlms_engine" / "assets" / "embedded"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def processor() -> str:
    """The processor's model name, with the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of train_embedded.py")
    parser.add_argument("--features", type=Path, required=True, help="folder of train_features.py")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--grid", type=Path, help="PNG of 100 samples of the exported model")
    args = parser.parse_args()
    args.assets.mkdir(parents=True, exist_ok=True)

    with safe_open(args.run / "checkpoint.safetensors", "pt") as handle:
        state = json.loads(handle.metadata()["state"])
        weights = {
            key.removeprefix("ema."): handle.get_tensor(key).bfloat16()
            for key in handle.keys()  # noqa: SIM118 - a safe_open handle is not iterable
            if key.startswith("ema.")
        }
    channels = tuple(int(c) for c in state["channels"].split(","))
    network: Any = build_network(state["size"], channels)  # also a diffusers ModelMixin
    network.load_state_dict(weights)
    network.save_config(args.assets)
    save_file(weights, args.assets / WEIGHTS, metadata={"format": "pt"})
    for name in ("features.safetensors", "reference.safetensors"):
        shutil.copyfile(args.features / name, args.assets / name)

    for path in args.assets.iterdir():
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone
    facts = json.loads((args.features / "facts.json").read_text())
    files = ("config.json", WEIGHTS, "features.safetensors", "reference.safetensors")
    provenance = {
        "data": {
            "name": "CIFAR-10",
            "source": "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
            "images": "the 50,000 training images, box-averaged from 32x32 to 16x16, in [-1, 1]",
            "note": "read from lossy JPEG copies; no image is part of this project",
        },
        "model": {
            "architecture": "diffusers UNet2DModel, EDM preconditioning, unconditional",
            "sigma_data": SIGMA_DATA,
            "c_noise_scale": C_NOISE_SCALE,
            "parameters": sum(p.numel() for p in network.parameters()),
            "images_seen": state["step"] * state["batch"],
            "images_budget": state["images"],
            "batch": state["batch"],
            "learning_rate": state["lr"],
            "seed": state["seed"],
            # Mean of the last 10 records of 100 batches each: one record is noisy.
            "final_loss": sum(loss for _, loss in state["history"][-10:])
            / max(1, len(state["history"][-10:])),
            "training_seconds": round(state["seconds"]),
            "weights": "exponential moving average, bfloat16",
        },
        "features": {**facts, "network": "dlms_engine.embedded.FeatureNetwork"},
        "hardware": processor(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "sha256": {
            name: hashlib.sha256((args.assets / name).read_bytes()).hexdigest() for name in files
        },
    }
    text = json.dumps(provenance, indent=2) + "\n"
    (args.assets / "provenance.json").write_text(text, encoding="utf-8")
    if args.grid is not None:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        sample_grid(network, args.grid, state["size"], 10, 18, seed=1)
    print(text)


if __name__ == "__main__":
    main()
