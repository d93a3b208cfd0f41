"""Which scheduler class of diffusers wrote a config, and what its constructor takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

READ_CLASSES = (
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "CosineDPMSolverMultistepScheduler",
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
"""Classes whose noise model is read here; any other of diffusers is refused by name."""


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether another class wrote ``config``: ours always has ``solver``, also after a detour."""
    return "solver" not in config


def class_of(config: Mapping[str, Any]) -> str | None:
    """The diffusers class that wrote ``config``: by its name, or else by its set of keys."""
    name = config.get("_class_name")
    if name is not None:
        return str(name)
    keys = frozenset(key for key in config if not key.startswith("_"))
    names = _classes_by_keys().get(keys, ())
    unread = [one for one in names if one not in READ_CLASSES]
    if unread and len(names) > 1 and "_use_default_values" in config:
        raise ValueError(
            f"the config has the keys of {' and '.join(names)}, which are different models: pass "
            f"{{**scheduler.config, '_class_name': '{names[0]}'}}"
        )
    return names[0] if names else None


@functools.cache
def _classes_by_keys() -> dict[frozenset[str], tuple[str, ...]]:
    """Constructor arguments of every scheduler of diffusers -> its names, the ones read here first."""
    import diffusers

    others = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and n not in READ_CLASSES)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for name in (*READ_CLASSES, *others):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and hasattr(cls, "from_config"):
            parameters = inspect.signature(cls).parameters
            keys = frozenset(key for key in parameters if key not in ("args", "kwargs"))
            found[keys] = (*found.get(keys, ()), name)
    return found


@functools.cache
def parameters_of(name: str) -> dict[str, Any]:
    """Constructor arguments of a scheduler of diffusers and their defaults."""
    import diffusers

    cls = getattr(diffusers, name, None)
    found = inspect.signature(cls).parameters if isinstance(cls, type) else {}
    return {key: parameter.default for key, parameter in found.items()}
