"""The papers' settings per data set, as data: ``distill(denoiser, **preset("amed-cifar10"), ...)``.

Each entry names its method and only what differs from that method's defaults.
"""

from __future__ import annotations

import copy
from typing import Any

_AMED_SOLVER: dict[str, Any] = {
    "method": "amed",
    "solver": "amed",
    "grid": "time_uniform",
    "teacher": "heun",
    "interpolation": 1,
    "scale_dir": 0.01,
    "scale_time": 0.0,
    "trajectories": 10_000,
    "batch": 64,
    "lr": 5e-3,
}
_AMED_IPNDM: dict[str, Any] = {
    **_AMED_SOLVER,
    "solver": "ipndm",
    "order": 4,
    "grid": "polynomial",
    "teacher": "same",
    "interpolation": 2,
}
_AMED_DPM2: dict[str, Any] = {
    **_AMED_SOLVER,
    "solver": "dpm_solver_2",
    "grid": "polynomial",
    "teacher": "same",
    "interpolation": 1,
}
_GITS: dict[str, Any] = {
    "method": "gits",
    "solver": "ipndm",
    "order": 4,
    "teacher": "ipndm",
    "teacher_order": 4,
    "metric": "dev",
    "gamma": 1.15,
    "points": 61,
    "trajectories": 256,
}
_DLMS: dict[str, Any] = {
    "method": "dlms",
    "order": 4,
    "prediction": "data",
    "init": "ab",
    "grid": "time_uniform",
    "afs": True,
    "teacher_interpolation": 4,
    "teacher_order": 3,
    "trajectories": 20_000,
    "lr": 5e-3,
    "ema_kimg": (1.0, 2.0, 3.0),
}
# Chosen on the embedded 16x16 model; docs/learners/dlms.md says what each setting buys.
_DLMS_EMBEDDED: dict[str, Any] = {
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

PRESETS: dict[str, dict[str, Any]] = {
    "dlms-embedded": _DLMS_EMBEDDED,
    # the same start and length without what is not in the paper
    "dlms-embedded-local": {**_DLMS_EMBEDDED, "endpoint_share": 0.0, "time_range": 0.4, "lr": 5e-3},
    # the paper's algorithm to the letter, on the embedded model's budget
    "dlms-embedded-literal": {**_DLMS, "last_step": "features", "trajectories": 3_200},
    # Zhou et al. 2024, section 4.1 and appendix; batches as the authors gave them in public
    "amed-cifar10": {**_AMED_SOLVER, "batch": 128},
    "amed-ffhq64": _AMED_SOLVER,
    "amed-imagenet64": _AMED_SOLVER,
    "amed-lsun-bedroom256": {**_AMED_SOLVER, "grid": "polynomial", "batch": 32},
    "amed-plugin-cifar10": {**_AMED_IPNDM, "scale_time": 0.2, "batch": 128},
    "amed-plugin-ffhq64": _AMED_IPNDM,
    "amed-plugin-imagenet64": _AMED_IPNDM,
    "amed-plugin-lsun-bedroom256": {**_AMED_DPM2, "batch": 32},
    "amed-plugin-imagenet256": {**_AMED_DPM2, "grid": "time_uniform", "batch": 32},
    "amed-plugin-stable-diffusion": {
        **_AMED_SOLVER,
        "solver": "dpm_solver_pp",
        "order": 2,
        "prediction": "noise",
        "teacher": "same",
        "interpolation": 2,
        "scale_dir": 0.0,
        "scale_time": 0.2,
        "trajectories": 5_000,
        "batch": 32,
    },
    # Chen et al. 2024
    "gits-cifar10": _GITS,
    "gits-ffhq64": _GITS,
    "gits-imagenet64": _GITS,
    "gits-lsun-bedroom256": _GITS,
    "gits-stable-diffusion": {
        **_GITS,
        "solver": "dpm_solver_pp",
        "order": 2,
        "options": {"prediction": "noise"},
        "grid": "time_uniform",
        "gamma": 1.2,
    },
    # Liang et al. 2025, appendix
    "dlms-cifar10": _DLMS,
    "dlms-ffhq64": _DLMS,
    "dlms-imagenet64": _DLMS,
    "dlms-lsun-bedroom256": {
        **_DLMS,
        "order": 3,
        "teacher_interpolation": 1,
        "teacher_order": 2,
        "trajectories": 10_000,
    },
    "dlms-imagenet256": {**_DLMS, "order": 3, "teacher_interpolation": 3, "trajectories": 5_000},
    "dlms-stable-diffusion": {
        **_DLMS,
        "order": 2,
        "teacher_interpolation": 1,
        "teacher_order": 2,
        "trajectories": 5_000,
    },
}
"""name -> keyword arguments of ``distill`` beside the model's."""


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """A copy of ``PRESETS[name]`` with ``changes``.

    Raises:
        ValueError: unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {sorted(PRESETS)}")
    return {**copy.deepcopy(PRESETS[name]), **changes}
