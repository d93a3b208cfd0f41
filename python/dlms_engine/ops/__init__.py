"""The fused row as torch operators: `dlms::fused_row`, `fused_row_` and `fused_row_backward`.

They run the compiled kernel of the tensors' device where there is one and eager torch elsewhere,
work under `torch.compile` and `torch.export`, and the functional one has gradients.
`backends.select` gives a particular implementation; `reference` is the meaning of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout, linear, reference
from . import libraries as _libraries  # noqa: F401  (loads the compiled kernels)
from .backends import Backend, BackendUnavailable, available, select
from .layout import pack_row, pack_rows, row_width

__all__ = [
    "Backend",
    "BackendUnavailable",
    "available",
    "fused_row",
    "fused_row_",
    "fused_row_backward",
    "layout",
    "libraries",
    "linear",
    "pack_row",
    "pack_rows",
    "reference",
    "row_width",
    "select",
]


def fused_row(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_next, m, network_input) of one row; differentiable once. See `reference.fused_row`."""
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.dlms.fused_row(f, f_cond, x, ring, row)
    return out


def fused_row_(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor, network_input: Tensor
) -> None:
    """One row in place: overwrites x, its ring slot and network_input; no gradients.

    Tensors that are written must be contiguous for the compiled backends.

    Raises:
        RuntimeError: a tensor requires grad while gradients are on.
    """
    torch.ops.dlms.fused_row_(f, f_cond, x, ring, row, network_input)


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
    """Gradients to (f, f_cond, x, ring, row). See `reference.fused_row_backward`."""
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.dlms.fused_row_backward(
        grad_x_next, grad_m, grad_input, f, f_cond, x, ring, row
    )
    return out
