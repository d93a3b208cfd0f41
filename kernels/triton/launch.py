"""Runs the Triton kernels on tensors: same arguments and results as `ops/reference.py`.

`wrap` is identity here and `torch.library.wrap_triton` in the operators, which lets torch.compile
see the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from dlms_engine.kernels.triton import device
from torch import Tensor

from dlms_engine.ops import layout, reference

Wrap = Callable[[Any], Any]

BLOCK = 1024
NUM_WARPS = 4
SUM_BLOCK = 128
MAX_PROGRAMS = 2**31 - 1
# One configuration, so nothing is tuned: this is how a bound on the registers passes torch.compile.
FORWARD = {
    size: triton.autotune([triton.Config({}, **options)], key=[])(device.fused_row_kernel)
    for size, options in device.FORWARD.items()
}
BACKWARD = triton.autotune([triton.Config({}, **device.BACKWARD)], key=[])(
    device.fused_row_backward_kernel
)


def fused_row(
    f: Tensor,
    f_cond: Tensor | None,
    x: Tensor,
    ring: Tensor,
    row: Tensor,
    wrap: Wrap = lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_next, m, network_input), new contiguous tensors. See `reference.fused_row`."""
    reference.check_shapes(f, f_cond, x, ring, row)
    x_next, m, network_input = x.new_empty(x.shape), x.new_empty(x.shape), f.new_empty(x.shape)
    x, ring = x.contiguous(), ring.contiguous()
    _forward(f, f_cond, x, ring, row, (x_next, m, network_input), False, wrap)
    return x_next, m, network_input


def fused_row_(
    f: Tensor,
    f_cond: Tensor | None,
    x: Tensor,
    ring: Tensor,
    row: Tensor,
    network_input: Tensor,
    wrap: Wrap = lambda kernel: kernel,
) -> None:
    """In place over x, one slot of the ring and network_input, which must be contiguous."""
    reference.check_shapes(f, f_cond, x, ring, row)
    reference.check_network_input(network_input, f, x)
    for name, tensor in (("x", x), ("ring", ring), ("network_input", network_input)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"dlms::fused_row_: {name} has strides {tensor.stride()}; what is written in place "
                f"must be contiguous: pass {name}.contiguous()"
            )
    _forward(f, f_cond, x, ring, row, (x, ring, network_input), True, wrap)


def _forward(
    f: Tensor,
    f_cond: Tensor | None,
    x: Tensor,
    ring: Tensor,
    row: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    m_to_ring: bool,
    wrap: Wrap,
) -> None:
    if x.numel() == 0:
        return
    f, row = f.contiguous(), row.contiguous()
    cond = f if f_cond is None else f_cond.contiguous()
    each = row.dim() == 2
    samples = x.shape[0] if each else 1
    n = x.numel() // samples
    blocks = -(-n // BLOCK)
    with _on(x):
        wrap(FORWARD[x.element_size()])[(_programs(samples * blocks),)](
            f,
            cond,
            x,
            ring,
            row,
            *outputs,
            n,
            blocks,
            x.numel(),
            row.shape[1] if each else 0,
            DEPTH=ring.shape[0],
            GUIDED=f_cond is not None,
            EACH=each,
            M_TO_RING=m_to_ring,
            BLOCK=BLOCK,
        )


def fused_row_backward(
    grad_x_next: Tensor,
    grad_m: Tensor,
    grad_input: Tensor,
    f: Tensor,
    f_cond: Tensor | None,
    x: Tensor,
    ring: Tensor,
    row: Tensor,
    wrap: Wrap = lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (f, f_cond, x, ring, row). See `reference.fused_row_backward`."""
    reference.check_shapes(f, f_cond, x, ring, row)
    grad_f = f.new_empty(f.shape)
    grad_f_cond = f.new_empty(0 if f_cond is None else f.shape)
    grad_x, grad_ring = x.new_empty(x.shape), x.new_empty(ring.shape)
    if x.numel() == 0:
        return grad_f, grad_f_cond, grad_x, grad_ring, row.new_zeros(row.shape)
    samples, width = x.shape[0], layout.row_width(ring.shape[0])
    n = x.numel() // samples
    blocks = -(-n // BLOCK)
    partial = x.new_empty((samples, blocks, width), dtype=torch.float64)
    f, x, ring, row = _aligned(f), _aligned(x), _aligned(ring), row.contiguous()
    cond = f if f_cond is None else _aligned(f_cond)
    gradients = (_aligned(grad_x_next), _aligned(grad_m), _aligned(grad_input))
    with _on(x):
        wrap(BACKWARD)[(_programs(samples * blocks),)](
            *gradients,
            f,
            cond,
            x,
            ring,
            row,
            grad_f,
            grad_f if f_cond is None else grad_f_cond,
            grad_x,
            grad_ring,
            partial,
            n,
            blocks,
            x.numel(),
            width if row.dim() == 2 else 0,
            DEPTH=ring.shape[0],
            GUIDED=f_cond is not None,
            BLOCK=BLOCK,
        )
        if row.dim() == 2:
            grad_row = _sum_middle(partial, row.dtype, wrap)
        else:
            each = _sum_middle(partial, torch.float64, wrap)
            grad_row = _sum_middle(each[None], row.dtype, wrap)[0]
    return grad_f, grad_f_cond, grad_x, grad_ring, grad_row


def _sum_middle(values: Tensor, dtype: torch.dtype, wrap: Wrap) -> Tensor:
    """[outer, count, width] float64 -> [outer, width], in an order that count alone decides."""
    outer, count, width = values.shape
    sums = values.new_empty((outer, width), dtype=dtype)
    wrap(device.sum_middle_kernel)[(_programs(outer * width),)](
        values, sums, count, width, BLOCK=SUM_BLOCK, num_warps=NUM_WARPS
    )
    return sums


def _aligned(t: Tensor) -> Tensor:
    """`t` contiguous and on a 16-byte boundary.

    Triton lays a block out by the alignment of its pointers and sums in that layout: a view at an
    odd offset would give the coefficient sums other bits.
    """
    t = t.contiguous()
    return t if t.storage_offset() * t.element_size() % 16 == 0 else t.clone()


def _programs(count: int) -> int:
    if count > MAX_PROGRAMS:
        raise ValueError(
            f"dlms (triton): {count} programs are needed, a launch takes at most {MAX_PROGRAMS}; "
            "split the batch"
        )
    return count


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
