"""The papers' settings per data set, as data: ``distill(denoiser, **preset("amed-cifar10"), ...)``.

Those of the embedded model are in ``presets.embedded``.
Each entry names its method and only what differs from that method's defaults.
"""

from __future__ import annotations

from typing import Any

from .embedded import EMBEDDED

_AMED_SOLVER: dict[str, Any] = {
    "method": "amed",
    "keep": "learned",
    "endpoint_share": 0.0,
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
    "candidates": "searched",
    "gamma": 1.15,
    "points": 61,
    "trajectories": 256,
}
_DLMS: dict[str, Any] = {
    "method": "dlms",
    "endpoint_share": 0.0,
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
    "clip": 1e30,
}
# section 3.3: pixel models charge the last step in Inception's features, given as feature_network
_DLMS_PIXEL: dict[str, Any] = {**_DLMS, "last_step": "features"}
# Tong et al. 2024, appendix B.1; the loss is the most perceptual one available (LPIPS in the
# paper). For latent models the public code differs: lr 0.005, three rounds with network times.
_LD3_PIXEL: dict[str, Any] = {
    "method": "ld3",
    "keep": "learned",
    "student": "unipc",
    "order": 3,
    "variant": "bh1",
    "coordinate": "lambda",
    "gamma": 0.001,
    "rounds": 2,
    "rounds_times": 5,
    "validation": 50,
    "batch": 2,
    "lr": 5e-3,
    "lr_times_share": 0.1,
    "teacher": "unipc",
    "teacher_order": 3,
    "teacher_nfe": 20,
    "teacher_grid": "logsnr",
    "trajectories": 50,
}
_LD3_LATENT: dict[str, Any] = {
    **_LD3_PIXEL,
    "order": 2,
    "variant": "bh2",
    "coordinate": "time",
    "batch": 1,
    "lr": 1e-3,
    "lr_times_share": 1e-3,
    "teacher_order": 2,
    "teacher_grid": "time_uniform",
}
# Kim et al. 2024, supplement, section 5: uniform time steps for noise models; the public code has
# the rho = 7 grid for EDM's.
_DODE_NOISE: dict[str, Any] = {
    "method": "dode",
    "keep": "learned",
    "solver": "ddim",
    "prediction": "noise",
    "grid": "time_uniform",
    "scale": 10,
    "trajectories": 100,
}
_DODE_EDM: dict[str, Any] = {**_DODE_NOISE, "prediction": "data", "grid": "polynomial"}

PRESETS: dict[str, dict[str, Any]] = {
    **EMBEDDED,
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
    # Tong et al. 2024
    "ld3-cifar10": _LD3_PIXEL,
    "ld3-ffhq64": _LD3_PIXEL,
    "ld3-afhqv2-64": _LD3_PIXEL,
    "ld3-lsun-bedroom256": _LD3_LATENT,
    "ld3-imagenet256": {**_LD3_LATENT, "teacher_nfe": 10},
    "ld3-stable-diffusion": {
        **_LD3_LATENT,
        "teacher_nfe": 10,
        "trajectories": 25,
        "validation": 25,
    },
    # Kim et al. 2024: noise models of discrete time, then EDM's data models; another solver by
    # solver="ipndm", "deis" or "dpm_solver" (noise models), "edm" (EDM's)
    "dode-cifar10": _DODE_NOISE,
    "dode-celeba64": _DODE_NOISE,
    "dode-imagenet128": _DODE_NOISE,
    "dode-lsun-bedroom256": {**_DODE_NOISE, "trajectories": 25},
    "dode-edm-cifar10": _DODE_EDM,
    "dode-edm-ffhq64": _DODE_EDM,
    "dode-edm-imagenet64": _DODE_EDM,
    # Liang et al. 2025, appendix
    "dlms-cifar10": _DLMS_PIXEL,
    "dlms-ffhq64": _DLMS_PIXEL,
    "dlms-imagenet64": _DLMS_PIXEL,
    "dlms-lsun-bedroom256": {
        **_DLMS,
        "order": 3,
        "teacher_interpolation": 1,
        "teacher_order": 2,
        "trajectories": 10_000,
    },
    "dlms-imagenet256": {
        **_DLMS_PIXEL,
        "order": 3,
        "teacher_interpolation": 3,
        "trajectories": 5_000,
    },
    "dlms-stable-diffusion": {
        **_DLMS,
        "order": 2,
        "teacher_interpolation": 1,
        "teacher_order": 2,
        "trajectories": 5_000,
    },
}
"""name -> keyword arguments of ``distill`` beside the model's."""


def of(method: str) -> dict[str, dict[str, Any]]:
    """Preset -> settings, of those for ``method``."""
    return {
        name: {key: value for key, value in settings.items() if key != "method"}
        for name, settings in PRESETS.items()
        if settings["method"] == method
    }
