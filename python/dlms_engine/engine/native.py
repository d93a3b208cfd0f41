"""The compiled module, or why there is none."""

from __future__ import annotations

from typing import Any


def _load() -> tuple[Any, str]:
    try:
        from .. import _C
    except ImportError as exc:  # absent, or built for another Python or torch
        return None, str(exc)
    return _C, ""


native, problem = _load()
