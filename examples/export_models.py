"""Make models of what ``train_models.py`` delivered.

    python examples/export_models.py --delivered delivered --draw 10

Reads ``NAME[.PART].safetensors`` and ``SET-features.safetensors``, whose metadata say everything else,
and writes ``config.json``, the weights, ``provenance.json`` and a model card: emoji into the package,
``cifar10-32`` into ``benchmarks/models/``. With ``--draw`` the exported model draws samples:
``docs/images/NAME-samples.png``, or ``samples.png`` beside the benchmark model. Models that were not
delivered are left as they are.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from draw_samples import draw_rows, picture
from model_card import card
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlms_engine.models.pretrained import read_features, read_network

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"cifar10-32": 40 * 10**6, "emoji": 6 * 10**6, "emoji-flow": 5 * 10**6}
"""Bytes that a model's files may take together."""
FEATURES = {"cifar10-32": "cifar10-32", "emoji": "emoji", "emoji-flow": "emoji"}
"""model -> the image set whose classifier measures it, and the model beside which that is kept."""
PROCESSES = {
    "edm": {"name": "edm", "t_min": 0.002, "t_max": 80.0},
    "flow": {"name": "rectified_flow", "t_min": 0.0, "t_max": 1.0},
}
DATA = {
    "cifar10": {
        "name": "CIFAR-10",
        "source": "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "licence": "none stated by its authors",
        "images": "the 50,000 training images at 32x32, in [-1, 1]",
        "note": "read from lossy JPEG copies; no image is part of this project",
    },
    "emoji": {
        "name": "Noto Emoji 2.048",
        "source": "Google's Noto Emoji as packaged by emoji-datasource-google 16.0.0",
        "licence": "Apache-2.0 (images), MIT (packaging)",
        "images": "1,906 emoji on white at 32x32, in [-1, 1]; skin-tone variants left out",
        "note": "no image is part of this project",
    },
}


def target(name: str, root: Path, models: Path | None = None) -> Path:
    """The folder of a model in a checkout; ``models`` holds the benchmark model's instead."""
    if name == "cifar10-32":
        return (models or root / "benchmarks" / "models") / name
    return root / "python" / "dlms_engine" / "models" / "assets" / name


def gathered(delivered: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The weights and facts of a delivered model; None where there is none.

    Raises:
        ValueError: a part is missing, or the parts are of different steps.
    """
    files = sorted([*delivered.glob(f"{name}.safetensors"), *delivered.glob(f"{name}.[0-9].*")])
    if not files:
        return None
    weights: dict[str, Tensor] = {}
    records = []
    for file in files:
        with safe_open(file, "pt") as opened:
            records.append(json.loads(opened.metadata()["training"]))
        weights |= load_file(file)
    steps = {record["step"] for record in records}
    parts = {record["part"] for record in records}
    if len(steps) > 1 or parts != set(range(records[0]["parts"])):
        raise ValueError(
            f"{name}: parts {sorted(parts)} of steps {sorted(steps)} are not one model"
        )
    return weights, records[0]


def model_config(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """``config.json``."""
    recipe = facts["recipe"]
    config: dict[str, Any] = {
        "network": facts["config"],
        "process": PROCESSES[recipe["prediction"]],
        "prediction": recipe["prediction"],
        "classes": facts["classes"] if facts["config"]["classes"] else [],
    }
    if "sigma_data" in recipe:
        config["sigma_data"] = recipe["sigma_data"]
    if FEATURES[name] != name:
        config["features"] = FEATURES[name]
    return config


def write_features(delivered: Path, name: str, folder: Path) -> dict[str, Any]:
    """Splits the delivered classifier into its two files; its facts.

    Raises:
        FileNotFoundError: it was not delivered and is not there from before.
    """
    source = delivered / f"{FEATURES[name]}-features.safetensors"
    if not source.exists():
        if (folder.parent / FEATURES[name] / "features.safetensors").exists():
            return {"network": "as before"}
        raise FileNotFoundError(f"{name} needs {source.name}, which is not in {delivered}")
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    facts: dict[str, Any] = json.loads(metadata["facts"])
    if FEATURES[name] == name:
        stored = load_file(source)
        reference = {k: v for k, v in stored.items() if k.startswith("reference.")}
        weights = {k: v for k, v in stored.items() if k not in reference}
        save_file(weights, folder / "features.safetensors", metadata={"widths": metadata["widths"]})
        shortened = {k.removeprefix("reference."): v for k, v in reference.items()}
        save_file(shortened, folder / "reference.safetensors")
    return {**facts, "network": "dlms_engine.models.features.ResidualFeatures"}


def provenance(name: str, facts: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    recipe = facts["recipe"]
    return {
        "data": DATA["cifar10" if name == "cifar10-32" else "emoji"],
        "model": {
            "architecture": "dlms_engine.models.unet.UNet",
            "prediction": recipe["prediction"],
            "parameters": facts["parameters"],
            "images_seen": facts["images_seen"],
            "steps": facts["step"],
            "batch": recipe["batch"],
            "learning_rate": recipe["lr"],
            "rate_when_stored": facts["learning_rate"],
            "seed": facts["seed"],
            "final_loss": facts["loss"],
            "training_seconds": facts["seconds"],
            "recipe": recipe,
            "weights": "exponential moving average, bfloat16",
        },
        "features": features,
        "hardware": facts["hardware"],
        "torch": facts["torch"],
        "commit": facts.get("commit") or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def commit() -> str | None:
    """This checkout's commit; the training names its own where ``DLMS_COMMIT`` tells it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def export(
    delivered: Path, name: str, root: Path = ROOT, draw: int = 0, models: Path | None = None
) -> Path | None:
    """Writes one model's folder, as ``target`` says; None when it was not delivered.

    Raises:
        ValueError: the parts are not one model, or the files are larger than a model may be.
    """
    found = gathered(delivered, name)
    if found is None:
        return None
    weights, facts = found
    folder = target(name, root, models)
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(name, facts)
    _write_json(folder / "config.json", config)
    save_file(weights, folder / "network.safetensors")
    features = write_features(delivered, name, folder)
    network = read_network(folder)  # refuses weights that are not the configuration's
    read_features(folder.parent / FEATURES[name] if FEATURES[name] != name else folder)
    record = provenance(name, facts, features)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".json"))
    record["sha256"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "provenance.json"
    }
    _write_json(folder / "provenance.json", record)
    (folder / "MODEL_CARD.md").write_text(card(name, config, record), encoding="utf-8")
    if draw:
        picked = folder / "samples.png"
        if name != "cifar10-32":
            picked = root / "docs" / "images" / f"{name}-samples.png"
            picked.parent.mkdir(parents=True, exist_ok=True)
        recipe = facts["recipe"]
        picture(draw_rows(network, recipe, config["network"]["classes"], draw, 1), picked)
    curve = delivered / name / "loss.png"
    if name == "cifar10-32" and curve.exists():
        shutil.copyfile(curve, folder / "loss.png")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone
    together = sum(path.stat().st_size for path in folder.iterdir())
    if together > SHARES[name]:
        raise ValueError(f"{folder} holds {together:,} bytes, at most {SHARES[name]:,} may be")
    return folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    for name in args.only or SHARES:
        folder = export(args.delivered, name, args.root, args.draw, args.models)
        print(f"{name}: " + (f"written to {folder}" if folder else "not delivered"), flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delivered", type=Path, required=True, help="folder of train_models.py")
    parser.add_argument("--only", nargs="+", choices=sorted(SHARES), help="models; default: all")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to write into")
    parser.add_argument("--models", type=Path, help="instead of its benchmarks/models")
    parser.add_argument("--draw", type=int, default=0, help="samples a row of the picture; 0: none")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(arguments())
