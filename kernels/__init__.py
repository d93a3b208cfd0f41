"""GPU implementations of the fused row: CUDA C++ (`cuda/`, compiled), Triton (`triton/`, source).

`register` tells `dlms_engine.ops` what is available here; importing this package touches no GPU and
imports no Triton.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

TRITON_RANK = 15
"""Preference of "auto": below the compiled CUDA library (20), above eager (0)."""


NAMES_IN_PLACE = ("f", "f_cond", "x", "ring", "row", "network_input")


def triton_reason() -> str | None:
    """Why the Triton backend cannot be had here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    if not interpreted() and not torch.backends.cuda.is_built():
        return "this torch is built without CUDA (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _without_gradients(operator: Callable[..., None]) -> Callable[..., None]:
    """``operator`` that refuses tensors which require grad; the versions torch counts itself."""
    from dlms_engine.ops import schema

    def fused_row_(*tensors: torch.Tensor | None) -> None:
        schema.refuse_gradients(**dict(zip(NAMES_IN_PLACE, tensors, strict=True)))
        operator(*tensors)

    return fused_row_


def register() -> None:
    """Register the Triton backend, also for `dlms::` on CUDA if no CUDA library is loaded."""
    # Here: ops calls this while it is imported.
    from dlms_engine.ops import backends, designer_row, schema

    reason = triton_reason()
    if reason is not None:
        backends.mark_missing("triton", reason)
        return
    from dlms_engine.kernels.triton import designer, launch, operators

    designer_row.register_designer(designer.KERNELS)
    backends.register_backend(
        backends.Backend(
            name="triton",
            device_types=("cuda", "cpu") if interpreted() else ("cuda",),
            # Never chosen by "auto" on the CPU: the interpreter is for tests.
            rank=-1 if interpreted() else TRITON_RANK,
            fused_row=operators.fused_row,
            fused_row_=_without_gradients(operators.fused_row_),
            in_loop=operators.fused_row_,
            fused_row_backward=operators.fused_row_backward,
        )
    )
    if torch.backends.cuda.is_built() and "cuda" not in backends.available():
        schema.register_kernels(
            "CUDA",
            {
                "fused_row": launch.fused_row,
                "fused_row_": launch.fused_row_,
                "_fused_row_": launch.fused_row_,
                "fused_row_backward": launch.fused_row_backward,
            },
        )
