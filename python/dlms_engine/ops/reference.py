"""The fused row in plain torch: what a row means, and the order of operations of every backend.

Each line below is one rounding in the state dtype. The other backends do the same operations in the
same order, without contraction into fused multiply-adds, so in float32 they agree bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from . import layout

NETWORK_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64,),
}
"""Dtypes of f and of the network input that go with a state dtype."""


def fused_row(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One row of a solver table: (x_next, m, network_input), all new tensors.

    f, f_cond, x: `[B, ...]`; ring: `[depth, B, ...]`; row: `[6 + depth]`, or `[B, 6 + depth]` for
    rows of their own. x, ring and row share the state dtype, float32 or float64; f and f_cond have
    the network's. x_next and m have the state dtype, network_input that of f. The ring is only read.
    """
    check_shapes(f, f_cond, x, ring, row)
    return advance(f, f_cond, x, (read_slot(ring, row, k) for k in range(1, ring.shape[0])), row)


def advance(
    f: Tensor, f_cond: Tensor | None, x: Tensor, history: Iterable[Tensor | None], row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_row` on a history that is a sequence, m_{n-1} first, instead of a ring; unchecked.

    Weights of what the history lacks are not read, nor those of a None in it.
    """
    coefficient = _columns(row, x)
    c_skip, c_out = coefficient(layout.C_SKIP), coefficient(layout.C_OUT)
    output = _mix(f, f_cond, coefficient(layout.GUIDANCE), x.dtype)
    m = c_skip * x + c_out * output
    x_next = coefficient(layout.A) * x
    for k, past in enumerate(itertools.chain((m,), history)):
        if past is None:
            continue
        weight = coefficient(layout.B + k)
        # A zero weight leaves the slot unread: it may hold NaN, and 0 * NaN must not reach x.
        x_next = torch.where(weight != 0, x_next + weight * past, x_next)
    network_input = (coefficient(layout.C_IN) * x_next).to(f.dtype)
    return x_next, m, network_input


def fused_row_(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor, network_input: Tensor
) -> None:
    """`fused_row` that overwrites x, one ring slot and network_input instead of allocating."""
    check_network_input(network_input, f, x)
    x_next, m, scaled = fused_row(f, f_cond, x, ring, row)
    x.copy_(x_next)
    write_slot(ring, row, m)
    network_input.copy_(scaled)


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
    """Gradients of `fused_row` to (f, f_cond, x, ring, row); f_cond's is empty without f_cond.

    grad_x_next, grad_m: `[B, ...]` in the state dtype, grad_input: `[B, ...]` in f's. grad_row has
    the shape of row; its sums run in float64 and its slot column is zero. The gradient to a weight
    that *is* zero still reads its slot, or learning could never leave zero; what is not finite there
    (a slot that was never written) counts as zero.
    """
    check_shapes(f, f_cond, x, ring, row)
    c = _columns(row, x)
    output = _mix(f, f_cond, c(layout.GUIDANCE), x.dtype)
    m = c(layout.C_SKIP) * x + c(layout.C_OUT) * output
    scaled_grad = grad_input.to(x.dtype)
    grad_next = grad_x_next + c(layout.C_IN) * scaled_grad
    grad_m = grad_m + c(layout.B) * grad_next
    grad_output = c(layout.C_OUT) * grad_m
    grad_x = c(layout.A) * grad_next + c(layout.C_SKIP) * grad_m

    x_next = c(layout.A) * x
    grad_ring = torch.zeros_like(ring, memory_format=torch.contiguous_format)
    grad_b = []
    for k in range(ring.shape[0]):
        weight = c(layout.B + k)
        past = m if k == 0 else read_slot(ring, row, k)
        x_next = torch.where(weight != 0, x_next + weight * past, x_next)
        seen = past if k == 0 else torch.where((weight != 0) | past.isfinite(), past, 0.0)
        grad_b.append(_reduce(grad_next, seen, row))
        if k > 0:
            write_slot(grad_ring, row, weight * grad_next, k)

    if f_cond is None:
        grad_f, grad_f_cond = grad_output.to(f.dtype), f.new_empty(0)
        grad_guidance = _reduce(torch.zeros_like(x), x, row)
    else:
        scaled = c(layout.GUIDANCE) * grad_output
        grad_f, grad_f_cond = (grad_output - scaled).to(f.dtype), scaled.to(f.dtype)
        grad_guidance = _reduce(grad_output, f_cond.to(x.dtype) - f.to(x.dtype), row)
    columns = [
        _reduce(grad_m, x, row),
        _reduce(grad_m, output, row),
        _reduce(grad_next, x, row),
        _reduce(scaled_grad, x_next, row),
        grad_guidance,
        torch.zeros_like(grad_guidance),
        *grad_b,
    ]
    return grad_f, grad_f_cond, grad_x, grad_ring, torch.stack(columns, dim=-1)


def read_slot(ring: Tensor, row: Tensor, k: int) -> Tensor:
    """m_{n-k}, `[B, ...]`, from slot (slot - k) mod depth; no value is read on the host."""
    index = _slot_index(ring, row, k)
    if row.dim() == 1:
        return ring.index_select(0, index.reshape(1))[0]
    return ring[index, torch.arange(ring.shape[1], device=ring.device)]


def write_slot(ring: Tensor, row: Tensor, value: Tensor, k: int = 0) -> None:
    """Overwrite slot (slot - k) mod depth, of every sample its own."""
    index = _slot_index(ring, row, k)
    if row.dim() == 1:
        ring.index_copy_(0, index.reshape(1), value[None])
    else:
        ring[index, torch.arange(ring.shape[1], device=ring.device)] = value


def check_shapes(f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor) -> None:
    """ValueError, naming both values, unless shapes, dtypes and devices fit together."""
    if x.dtype not in NETWORK_DTYPES:
        raise ValueError(f"dlms::fused_row: x is {x.dtype}, expected float32 or float64")
    if f.dtype not in NETWORK_DTYPES[x.dtype]:
        allowed = ", ".join(str(d) for d in NETWORK_DTYPES[x.dtype])
        raise ValueError(f"dlms::fused_row: f is {f.dtype}, a {x.dtype} state takes {allowed}")
    if x.dim() < 1 or f.shape != x.shape:
        raise ValueError(
            f"dlms::fused_row: f is {tuple(f.shape)}, x is {tuple(x.shape)}; expected both [B, ...]"
        )
    if f_cond is not None and (f_cond.shape != f.shape or f_cond.dtype != f.dtype):
        raise ValueError(
            f"dlms::fused_row: f_cond is {f_cond.dtype} {tuple(f_cond.shape)}, "
            f"expected {f.dtype} {tuple(f.shape)} as f"
        )
    if ring.dim() != x.dim() + 1 or ring.shape[1:] != x.shape or ring.shape[0] < 1:
        raise ValueError(
            f"dlms::fused_row: ring is {tuple(ring.shape)}, expected [depth, *{tuple(x.shape)}]"
        )
    width = layout.row_width(ring.shape[0])
    if row.shape != (width,) and row.shape != (x.shape[0], width):
        raise ValueError(
            f"dlms::fused_row: row is {tuple(row.shape)}, expected [{width}] or "
            f"[{x.shape[0]}, {width}] for a ring of {ring.shape[0]} slots"
        )
    if ring.dtype != x.dtype or row.dtype != x.dtype:
        raise ValueError(
            f"dlms::fused_row: ring is {ring.dtype} and row is {row.dtype}, expected {x.dtype} as x"
        )
    for name, other in (("f", f), ("f_cond", f_cond), ("ring", ring), ("row", row)):
        if other is not None and other.device != x.device:
            raise ValueError(f"dlms::fused_row: {name} is on {other.device}, x is on {x.device}")


def check_network_input(network_input: Tensor, f: Tensor, x: Tensor) -> None:
    """ValueError unless `network_input` has f's dtype and x's shape and device."""
    same = network_input.shape == x.shape and network_input.dtype == f.dtype
    if not same or network_input.device != x.device:
        raise ValueError(
            f"dlms::fused_row_: network_input is {network_input.dtype} "
            f"{tuple(network_input.shape)} on {network_input.device}, "
            f"expected {f.dtype} {tuple(x.shape)} on {x.device}"
        )


class _columns:
    """Column j of the row, shaped to broadcast against `[B, ...]`."""

    def __init__(self, row: Tensor, x: Tensor) -> None:
        self.row, self.shape = row, (-1,) + (1,) * (x.dim() - 1)

    def __call__(self, j: int) -> Tensor:
        column = self.row[..., j]
        return column if self.row.dim() == 1 else column.reshape(self.shape)


def _mix(f: Tensor, f_cond: Tensor | None, guidance: Tensor, dtype: torch.dtype) -> Tensor:
    if f_cond is None:
        return f.to(dtype)
    uncond = f.to(dtype)
    return uncond + guidance * (f_cond.to(dtype) - uncond)


def _slot_index(ring: Tensor, row: Tensor, k: int) -> Tensor:
    return (row[..., layout.SLOT].long() - k) % ring.shape[0]


def _reduce(u: Tensor, v: Tensor, row: Tensor) -> Tensor:
    """Sum of u * v over the samples that a row serves: all of them, or one."""
    product = u.double() * v.double()
    total = product.sum() if row.dim() == 1 else product[:, None].flatten(1).sum(1)
    return total.to(row.dtype)
