"""Settings of the training examples: one preset a model."""

from __future__ import annotations

from typing import Any

TRAINING: dict[str, dict[str, Any]] = {
    "embedded": {
        "size": 16,
        "channels": "16,64",
        "layers": 1,
        "attention": "",
        "groups": 8,
        "head": 64,
        "images": 2_000_000,
        "batch": 128,
        "lr": 2e-3,
        "warmup": 30_000,
        "ema_half_life": 50_000.0,
        "augment": 0.0,
        "cooldown": 0,
    },
    # 13 million parameters: most of them at 8x8, where they cost least.
    "cifar10-32": {
        "size": 32,
        "channels": "64,128,256",
        "layers": 2,
        "attention": "1",
        "groups": 32,
        "head": 64,
        "images": 40_000_000,
        "batch": 1024,
        "lr": 1e-3,
        "warmup": 200_000,
        "ema_half_life": 500_000.0,
        "augment": 0.12,
        "cooldown": 4_000_000,
    },
}
"""name -> defaults of ``train_embedded.py``; --help says what each means."""

CLASSIFIER: dict[str, dict[str, Any]] = {
    "embedded": {
        "size": 16,
        "widths": "",
        "epochs": 12,
        "batch": 256,
        "lr": 4e-3,
        "weight_decay": 0.02,
        "warm": 0.2,
        "crop": 0,
    },
    "cifar10-32": {
        "size": 32,
        "widths": "64,128,256",
        "epochs": 40,
        "batch": 512,
        "lr": 4e-3,
        "weight_decay": 0.05,
        "warm": 0.2,
        "crop": 4,
    },
}
"""name -> defaults of ``train_features.py``."""


def defaults(presets: dict[str, dict[str, Any]], arguments: list[str] | None) -> dict[str, Any]:
    """The preset that ``--preset`` names in the arguments (``embedded`` without it)."""
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(presets), default="embedded")
    name = parser.parse_known_args(arguments)[0].preset
    return {"preset": name, **presets[name]}
