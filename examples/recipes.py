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
        "epochs": 30,
        "batch": 512,
        "lr": 4e-3,
        "weight_decay": 0.05,
        "warm": 0.2,
        "crop": 4,
    },
    "emoji": {
        "size": 32,
        "widths": "32,64,64",
        "epochs": 150,
        "batch": 128,
        "lr": 4e-3,
        "weight_decay": 0.05,
        "warm": 0.2,
        "crop": 0,
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


EMOJI_NETWORK = {
    "size": 32,
    "channels": [48, 80, 112],
    "layers": 1,
    "attention": [1, 2],
    "patch": 2,
    "head": 16,
    "groups": 8,
}
TIMED: dict[str, dict[str, Any]] = {
    "cifar10-32": {
        "prediction": "edm",
        "sigma_data": 0.5,
        "level_mean": -1.2,
        "level_std": 1.2,
        "network": {
            "size": 32,
            "channels": [64, 128, 256],
            "layers": 2,
            "attention": [1, 2],
            "patch": 1,
            "head": 64,
            "groups": 32,
        },
        "batch": 512,
        "lr": 1e-3,
        "warmup": 150_000,
        "cooldown": 0.35,
        "ema_share": 0.03,
        "dropout": 0.0,
        "guidance": 1.0,
    },
    "emoji": {
        "prediction": "edm",
        "sigma_data": 0.8,
        "level_mean": -0.6,
        "level_std": 1.3,
        "network": EMOJI_NETWORK,
        "batch": 512,
        "lr": 2e-3,
        "warmup": 150_000,
        "cooldown": 0.4,
        "ema_share": 0.03,
        "dropout": 0.15,
        "guidance": 2.0,
    },
    "emoji-flow": {
        "prediction": "flow",
        "level_mean": 0.2,
        "level_std": 1.2,
        # Times lie in [0, 1]; the embedding is made for an interval of about 2.5.
        "network": {**EMOJI_NETWORK, "time_scale": 2.5},
        "batch": 512,
        "lr": 2e-3,
        "warmup": 150_000,
        "cooldown": 0.4,
        "ema_share": 0.03,
        "dropout": 0.15,
        "guidance": 2.0,
    },
}
"""name -> recipe of ``timed_training.py``: the noise level is ``level_mean + level_std * normal``, the
logarithm of sigma or the logit of a flow's time; ``cooldown`` is a share of the seconds, ``ema_share``
the average's half-life as a share of the images seen, ``dropout`` the probability of a hidden class
(0: unconditional)."""
