"""Settings chosen on the embedded 16x16 model, one set a method."""

from __future__ import annotations

from typing import Any

# docs/learners/dlms.md says what each setting buys
_DLMS: dict[str, Any] = {
    "method": "dlms",
    "prediction": "noise",
    "init": "ipndm",
    "grid": "polynomial",
    "time_range": 1.0,
    "teacher_interpolation": 2,
    "last_step": "features",
    "score": "product",
    "endpoint_share": 0.85,
    "trajectories": 3_200,
    "lr": 1e-2,
    "decay": "cosine",
    "warmup": 5,
    "ema_kimg": (0.25, 0.5, 1.0),
}
# the same start and length without what is not in the paper
_DLMS_LOCAL: dict[str, Any] = {
    **_DLMS,
    "endpoint_share": 0.0,
    "time_range": 0.4,
    "lr": 5e-3,
}
_AMED: dict[str, Any] = {
    "method": "amed",
    "endpoint_share": 0.0,
    "batch": 32,
    "trajectories": 2_048,
    "decay": "cosine",
    "ema_kimg": (0.25, 0.5),
}
_PLUGIN: dict[str, Any] = {**_AMED, "scale_dir": 0.1, "scale_time": 0.2, "interpolation": 4}

EMBEDDED: dict[str, dict[str, Any]] = {
    "dlms-embedded": _DLMS,
    "dlms-embedded-local": _DLMS_LOCAL,
    # the paper's algorithm to the letter, on the embedded model's budget
    "dlms-embedded-literal": {
        "method": "dlms",
        "endpoint_share": 0.0,
        "order": 4,
        "prediction": "data",
        "init": "ab",
        "grid": "time_uniform",
        "teacher_interpolation": 4,
        "teacher_order": 3,
        "last_step": "features",
        "lr": 5e-3,
        "trajectories": 3_200,
    },
    "amed-embedded": {**_AMED, "solver": "amed"},
    "amed-plugin-embedded": {**_PLUGIN, "solver": "dpm_solver_pp", "order": 3},
    "amed-plugin-ipndm-embedded": {**_PLUGIN, "solver": "ipndm", "order": 4},
    "ld3-embedded": {
        "method": "ld3",
        "student": "unipc",
        "order": 3,
        "loss": "features",
        "lr_times_share": 0.1,
        "rounds_times": 5,
        "batch": 10,
        "validation": 50,
        "whole": True,
        "trajectories": 100,
        "lr": 1e-2,
    },
    "free-table-embedded": {
        "method": "free_table",
        "last_step": "features",
        "score": "product",
        # few updates: corrections that keep constants constant, and weights as quick as times
        "sum_to_base": True,
        "learn_state": False,
        "trajectories": 1_600,
        "lr": 1e-2,
        "times_lr": 3.0,
        "network_times_lr": 1.5,
        "weights_lr": 1.0,
        "warmup": 3,
        "ema_kimg": (0.25, 0.5),
    },
}
"""name -> keyword arguments of ``distill``."""
