"""One steady-state `scheduler.step` of diffusers, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STEPS = 20
AT = 12
"""The step that is timed: the middle of a run, history full, full order."""

RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "DEIS-2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "Euler": ("EulerDiscreteScheduler", {}),
}


def available() -> bool:
    """Whether diffusers is installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def version() -> str | None:
    """Version of diffusers, or None."""
    if not available():
        return None
    import diffusers

    return str(diffusers.__version__)


def step_call(name: str, x: Tensor, f: Tensor) -> Callable[[], object]:
    """A call that takes step `AT` of `STEPS` again and again.

    x, f: `[B, ...]` state and network output; the state keeps f's dtype, as a pipeline's does.
    """
    import diffusers

    class_name, options = RIVALS[name]
    scheduler = getattr(diffusers, class_name)(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(STEPS)
    latent = x.to(f.dtype)
    for t in scheduler.timesteps[:AT]:
        scheduler.scale_model_input(latent, t)
        scheduler.step(f, t, latent, return_dict=False)
    t = scheduler.timesteps[AT]
    pinned = {
        key: copy.copy(value)
        for key, value in vars(scheduler).items()
        if key
        in ("_step_index", "model_outputs", "timestep_list", "lower_order_nums", "last_sample")
    }

    def call() -> object:
        for key, value in pinned.items():
            setattr(scheduler, key, value.copy() if isinstance(value, list) else value)
        return scheduler.step(f, t, latent, return_dict=False)

    with torch.no_grad():
        call()
    return call
