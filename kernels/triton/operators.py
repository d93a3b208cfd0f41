"""The Triton kernels as operators `dlms_triton::fused_row`, `fused_row_` and `fused_row_backward`.

On a GPU they are `torch.library.triton_op`s: torch.compile and AOTInductor see the kernels inside
and can package them. Under TRITON_INTERPRET=1 they are `torch.library.custom_op`s with the same
schema, since the fake-tensor trace of a triton_op would run the interpreter on fake tensors.
"""

from typing import Any

import torch
from dlms_engine.kernels import interpreted
from dlms_engine.kernels.triton import launch
from torch import Tensor
from torch.library import wrap_triton

from dlms_engine.ops import schema


def _operator(name: str, mutates: tuple[str, ...] = ()) -> Any:
    if interpreted():
        return torch.library.custom_op(f"dlms_triton::{name}", mutates_args=mutates)
    return torch.library.triton_op(f"dlms_triton::{name}", mutates_args=mutates)


_wrap: Any = (lambda kernel: kernel) if interpreted() else wrap_triton


@_operator("fused_row")  # type: ignore[untyped-decorator]
def fused_row(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.reference.fused_row`."""
    out: tuple[Tensor, Tensor, Tensor] = launch.fused_row(f, f_cond, x, ring, row, _wrap)
    return out


@_operator("fused_row_", ("x", "ring", "network_input"))  # type: ignore[untyped-decorator]
def fused_row_(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor, network_input: Tensor
) -> None:
    """See `ops.reference.fused_row_`."""
    launch.fused_row_(f, f_cond, x, ring, row, network_input, _wrap)


@_operator("fused_row_backward")  # type: ignore[untyped-decorator]
def fused_row_backward(
    grad_x_next: Tensor,
    grad_m: Tensor,
    grad_input: Tensor,
    f: Tensor,
    f_cond: Tensor | None,
    x: Tensor,
    ring: Tensor,
    row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.reference.fused_row_backward`."""
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = launch.fused_row_backward(
        grad_x_next, grad_m, grad_input, f, f_cond, x, ring, row, _wrap
    )
    return out


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    f, f_cond, x, ring, row = ctx.saved_tensors
    grad_f, grad_f_cond, *rest = fused_row_backward(*grads, f, f_cond, x, ring, row)
    return grad_f, None if f_cond is None else grad_f_cond, *rest


if interpreted():
    fused_row.register_fake(schema._fake_fused_row)
    fused_row_.register_fake(schema._fake_fused_row_)
    fused_row_backward.register_fake(schema._fake_backward)
fused_row.register_autograd(_backward, setup_context=schema._save_for_backward)
