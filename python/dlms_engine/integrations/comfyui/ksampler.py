"""The handcrafted solvers in KSampler's list of samplers."""

from __future__ import annotations

import functools
import logging
from typing import Any

from dlms_engine.integrations.k_diffusion import sample_dlms
from dlms_engine.solvers import SOLVERS

_log = logging.getLogger("dlms_engine")
PREFIX = "dlms_"


def register_samplers() -> list[str]:
    """Adds ``dlms_<solver>`` to ComfyUI's samplers; returns the names, none outside of ComfyUI.

    ComfyUI looks a sampler up as ``sample_<name>`` in its copy of k-diffusion.
    """
    try:
        import comfy.samplers
        from comfy.k_diffusion import sampling
    except ImportError:
        return []
    lists = [getattr(comfy.samplers, name, None) for name in ("KSAMPLER_NAMES", "SAMPLER_NAMES")]
    lists.append(getattr(getattr(comfy.samplers, "KSampler", None), "SAMPLERS", None))
    names = [PREFIX + solver for solver in sorted(SOLVERS)]
    for name in names:
        setattr(sampling, f"sample_{name}", _sampler(name.removeprefix(PREFIX)))
        for known in lists:
            if isinstance(known, list) and name not in known:
                known.append(name)
    if not any(isinstance(known, list) for known in lists):
        _log.warning("this ComfyUI keeps its samplers elsewhere: KSampler does not list dlms_*")
    return names


def _sampler(solver: str) -> Any:
    @functools.wraps(sample_dlms)
    def sample(*args: Any, **kwargs: Any) -> Any:
        return sample_dlms(*args, **kwargs, solver=solver)

    return sample
