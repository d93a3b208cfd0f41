"""Noise processes, and grids of their times (``processes.grids``)."""

from .base import Process, as_float64
from .continuous import (
    EDM,
    PROCESSES,
    VP,
    Cosine,
    RectifiedFlow,
    edm_coordinates,
    from_config,
    require_known,
)
from .discrete import VPDiscrete

__all__ = [
    "EDM",
    "PROCESSES",
    "VP",
    "Cosine",
    "Process",
    "RectifiedFlow",
    "VPDiscrete",
    "as_float64",
    "edm_coordinates",
    "from_config",
    "require_known",
]
