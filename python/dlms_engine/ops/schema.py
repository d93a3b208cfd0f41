"""The `dlms::` operators: schemas, eager kernels, fake kernels and autograd, registered once.

The schemas are defined here and nowhere else. The compiled libraries (`_ops_cpu.so`,
`_ops_cuda.so`) only add kernels under their own dispatch keys, so the operators exist, with the same
contract, on every device and without any compiled part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

LIBRARY = torch.library.Library("dlms", "DEF")  # kept alive: the registrations go with it

_IN_PLACE = (
    "(Tensor f, Tensor? f_cond, Tensor(a!) x, Tensor(b!) ring, Tensor row, "
    "Tensor(c!) network_input) -> ()"
)
_ROW = "Tensor f, Tensor? f_cond, Tensor {x}x, Tensor {ring}ring, Tensor row"
SCHEMAS = {
    "fused_row": (
        f"({_ROW.format(x='', ring='')}) -> (Tensor x_next, Tensor m, Tensor network_input)"
    ),
    "fused_row_": _IN_PLACE,
    # The same row for loops over buffers of their own: it counts no versions and looks for no leaf,
    # which would cost more than the row of a small state.
    "_fused_row_": _IN_PLACE,
    "fused_row_backward": (
        "(Tensor grad_x_next, Tensor grad_m, Tensor grad_input, "
        f"{_ROW.format(x='', ring='')}) -> (Tensor grad_f, Tensor grad_f_cond, Tensor grad_x, "
        "Tensor grad_ring, Tensor grad_row)"
    ),
}


def register_operators() -> None:
    """Define the operators with their eager, fake and autograd kernels."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        meaning = getattr(reference, name.removeprefix("_"))
        LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    fake: Callable[..., Any] = torch.library.register_fake
    fake("dlms::fused_row", _fake_fused_row, lib=LIBRARY)
    fake("dlms::fused_row_", _fake_fused_row_, lib=LIBRARY)
    fake("dlms::_fused_row_", _fake_fused_row_, lib=LIBRARY)
    fake("dlms::fused_row_backward", _fake_backward, lib=LIBRARY)
    LIBRARY.impl("fused_row_", _fused_row_for_autograd, "ADInplaceOrView")
    torch.library.register_autograd(
        "dlms::fused_row", _backward, setup_context=_save_for_backward, lib=LIBRARY
    )
    torch.library.register_autograd("dlms::fused_row_backward", _no_second_order, lib=LIBRARY)


def register_kernels(dispatch_key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Add Python-side kernels (Triton, say) for `dispatch_key`; names as in `SCHEMAS`."""
    for name, kernel in kernels.items():
        if name not in SCHEMAS:
            raise ValueError(f"no operator dlms::{name}; expected one of {', '.join(SCHEMAS)}")
        LIBRARY.impl(name, kernel, dispatch_key)


def _fake_fused_row(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_shapes(f, f_cond, x, ring, row)
    shape = x.shape
    return x.new_empty(shape), x.new_empty(shape), f.new_empty(shape)


def _fake_fused_row_(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor, network_input: Tensor
) -> None:
    reference.check_shapes(f, f_cond, x, ring, row)
    reference.check_network_input(network_input, f, x)


def refuse_gradients(**tensors: Tensor | None) -> None:
    """RuntimeError if one of the tensors requires grad while gradients are on."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"dlms::fused_row_: {name} requires grad, but a row in place keeps no graph: pass "
                f"{name}.detach(), call it under torch.no_grad(), or use dlms::fused_row, which has "
                "gradients"
            )


def _fused_row_for_autograd(
    f: Tensor, f_cond: Tensor | None, x: Tensor, ring: Tensor, row: Tensor, network_input: Tensor
) -> None:
    """What autograd has to know of a write: it invalidates what was saved for backward."""
    # No C++: torch's stable interface neither counts versions nor knows of gradients.
    refuse_gradients(f=f, f_cond=f_cond, x=x, ring=ring, row=row, network_input=network_input)
    torch.ops.dlms._fused_row_.default(f, f_cond, x, ring, row, network_input)
    torch.autograd.graph.increment_version((x, ring, network_input))


def _fake_backward(
    grad_x_next: Tensor,
    grad_m: Tensor,
    grad_input: Tensor,
    f: Tensor,
    f_cond: Tensor | None,
    x: Tensor,
    ring: Tensor,
    row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reference.check_shapes(f, f_cond, x, ring, row)
    grad_f_cond = f.new_empty(0 if f_cond is None else f.shape)
    grads = (x.new_empty(x.shape), x.new_empty(ring.shape), x.new_empty(row.shape))
    return f.new_empty(f.shape), grad_f_cond, *grads


def _save_for_backward(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    f, f_cond, x, ring, row = ctx.saved_tensors
    grad_f, grad_f_cond, *rest = torch.ops.dlms.fused_row_backward(
        *(g.contiguous() for g in grads), f, f_cond, x, ring, row
    )
    return grad_f, None if f_cond is None else grad_f_cond, *rest


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "dlms::fused_row is differentiable once; for second derivatives call "
        "dlms_engine.ops.reference.fused_row, which is plain torch"
    )
