"""The compiled module, or why there is none."""

from __future__ import annotations

import logging
from typing import Any

NEEDED = (
    "DriverError",
    "GraphCache",
    "GraphRun",
    "SamplingLoop",
    "cpu_isa",
    "cuda_stream",
    "graph_key",
    "loop_graph",
    "loop_kernel",
)
"""Names of ``_C`` that the package uses: a build of older sources lacks some."""

_log = logging.getLogger("dlms_engine")


def load_native() -> tuple[Any, str]:
    """``(module, "")``, or ``(None, problem)``; a build of other sources is not used."""
    try:
        from .. import _C
    except ImportError as exc:  # absent, or built for another Python or torch
        return None, str(exc)
    return usable(_C)


def usable(module: Any) -> tuple[Any, str]:
    """``(module, "")`` if it has every name in ``NEEDED``, else ``(None, problem)`` and a warning."""
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if not missing:
        return module, ""
    problem = (
        f"dlms_engine._C was built from other sources (it lacks {', '.join(missing)}): rebuild it, "
        "pip install --no-build-isolation -e . in the source folder, or reinstall dlms_engine"
    )
    _log.warning("%s; running without it", problem)
    return None, problem


native, problem = load_native()
