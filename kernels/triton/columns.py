"""Columns of a row, `ops/layout.py`, as Triton kernels may name them."""

from __future__ import annotations

import triton.language as tl

from dlms_engine.ops import layout

C_SKIP = tl.constexpr(layout.C_SKIP)
C_OUT = tl.constexpr(layout.C_OUT)
A = tl.constexpr(layout.A)
C_IN = tl.constexpr(layout.C_IN)
GUIDANCE = tl.constexpr(layout.GUIDANCE)
SLOT = tl.constexpr(layout.SLOT)
B = tl.constexpr(layout.B)
