"""Columns of a row: the vector of `6 + depth` numbers that one fused row reads.

column     name       meaning
0          c_skip     m = c_skip * x + c_out * F
1          c_out
2          a          weight of x_n in x_{n+1}
3          c_in       scale of the *next* network input, c_in[n+1] * x_{n+1}
4          guidance   F = F_uncond + guidance * (F_cond - F_uncond)
5          slot       ring slot that m is written to: a small integer, exact in float32
6 + k      b_k        weight of m_{n-k}, which lies in ring slot (slot - k) mod depth
"""

from __future__ import annotations

import torch
from torch import Tensor

C_SKIP = 0
C_OUT = 1
A = 2
C_IN = 3
GUIDANCE = 4
SLOT = 5
B = 6


def row_width(depth: int) -> int:
    """Numbers in one row for a history of `depth` slots."""
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1: the output of this row is a slot")
    return B + depth


def depth_of(width: int) -> int:
    """History depth of a row of `width` numbers, the inverse of `row_width`."""
    if width <= B:
        raise ValueError(f"a row has {width} numbers, expected more than {B}: see ops/layout.py")
    return width - B


def pack_rows(
    c_skip: Tensor,
    c_out: Tensor,
    a: Tensor,
    c_in_next: Tensor,
    guidance: Tensor | float,
    b: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """All rows of a table as the fused row reads them, `[..., rows, 6 + depth]`, differentiable.

    c_skip, c_out, a, c_in_next: `[..., rows]` float64; b: `[..., rows, depth]`, b[..., n, k] weighs
    m_{n-k}. c_in_next[n] scales the input of evaluation n + 1; `guidance` broadcasts to
    `[..., rows]`. Leading dimensions broadcast. Row n writes ring slot n mod depth. `dtype` rounds
    the result, once, to the state dtype; None keeps that of `a`.
    """
    if b.dim() < 2:
        raise ValueError(f"b is {tuple(b.shape)}, expected [..., rows, depth]")
    *_, rows, depth = b.shape
    columns = (("c_skip", c_skip), ("c_out", c_out), ("a", a), ("c_in_next", c_in_next))
    for name, column in columns:
        if column.shape[-1:] != (rows,):
            raise ValueError(f"{name} is {tuple(column.shape)}, expected [..., {rows}]: b has rows")
    slots = torch.arange(rows, device=a.device) % depth
    return _pack(c_skip, c_out, a, c_in_next, guidance, slots, b, dtype)


def pack_row(
    c_skip: Tensor,
    c_out: Tensor,
    a: Tensor,
    c_in_next: Tensor,
    guidance: Tensor | float,
    slot: int,
    b: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One row, `[6 + depth]`, or `[B, 6 + depth]` when any argument has a batch; see `pack_rows`.

    c_skip, c_out, a, c_in_next, guidance: `[]` or `[B]`; b: `[depth]` or `[B, depth]`;
    0 <= slot < depth.
    """
    depth = b.shape[-1]
    if not 0 <= slot < depth:
        raise ValueError(f"slot is {slot}, expected 0 .. {depth - 1}: b has {depth} weights")
    return _pack(c_skip, c_out, a, c_in_next, guidance, a.new_full((), slot), b, dtype)


def _pack(
    c_skip: Tensor,
    c_out: Tensor,
    a: Tensor,
    c_in_next: Tensor,
    guidance: Tensor | float,
    slot: Tensor,
    b: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    # Filled on the device: a copy of a host number could not be captured in a CUDA graph.
    if not isinstance(guidance, Tensor):
        guidance = a.new_full((), guidance)
    columns = (c_skip, c_out, a, c_in_next, guidance, slot.to(a))
    batch = torch.broadcast_shapes(b.shape[:-1], *(column.shape for column in columns))
    head = torch.stack([column.to(a).expand(batch) for column in columns], dim=-1)
    rows = torch.cat([head, b.to(a).expand(*batch, b.shape[-1])], dim=-1)
    return rows if dtype is None else rows.to(dtype)
