"""Finds and loads the compiled operator libraries; each is optional."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

from . import backends, schema

RANKS = {"cpu": 10, "cuda": 20, "triton": 15}
"""Preference of "auto" among the backends that fit a device; eager is 0."""


def load_all() -> None:
    """Load every library that is there, and let `dlms_engine.kernels` register its backends."""
    for name in ("cpu", "cuda"):
        _load(name)
    # kernels/ is installed beside the package; a bare source tree does not have it.
    if importlib.util.find_spec("dlms_engine.kernels") is not None:
        from dlms_engine import kernels  # type: ignore[attr-defined, unused-ignore]

        kernels.register()
    else:
        backends.mark_missing("triton", "dlms_engine.kernels is not installed")


def find(stem: str) -> Path | None:
    """The file `stem`*.so of the package, or None. An editable install has two package folders."""
    import dlms_engine

    for folder in dlms_engine.__path__:
        for path in sorted(Path(folder).glob(f"{stem}.*")):
            if path.suffix in (".so", ".pyd", ".dylib"):
                return path
    return None


def early_slots_limit(elements: int | None = None) -> int:
    """Elements of a state up to which the CUDA row loads every ring slot before the row's is known.

    ``elements`` sets it, for the whole process: 0 for never. The results have the same bits either
    way; launches that a CUDA graph holds stay as they were captured. Returns the limit that held
    before.

    Raises:
        BackendUnavailable: the CUDA library is not part of this installation.
        ValueError: ``elements`` is negative.
    """
    if elements is not None and elements < 0:
        raise ValueError(f"elements is {elements}, expected 0 or more")
    backends.select("cuda")
    limit = ctypes.CDLL(str(find("_ops_cuda"))).dlms_early_slots_limit
    limit.argtypes, limit.restype = [ctypes.c_int64], ctypes.c_int64
    return int(limit(-1 if elements is None else elements))


def _load(name: str) -> None:
    path = find(f"_ops_{name}")
    if path is None:
        backends.mark_missing(name, f"dlms_engine was built without _ops_{name}")
        return
    if name == "cuda" and not torch.backends.cuda.is_built():
        backends.mark_missing(name, "this torch is built without CUDA")
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as exc:
        backends.mark_missing(name, f"{path.name} does not load ({exc})")
        backends.log.warning("%s does not load: %s", path, exc)
        return
    ops = torch.ops.dlms
    backends.register_backend(
        backends.Backend(
            name=name,
            device_types=(name,),
            rank=RANKS[name],
            fused_row=ops.fused_row,
            fused_row_=ops.fused_row_.default,
            fused_row_backward=ops.fused_row_backward,
            in_loop=ops._fused_row_.default,
        )
    )


schema.register_operators()
load_all()
