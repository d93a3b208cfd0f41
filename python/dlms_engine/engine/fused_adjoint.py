"""A table's run through the fused row, and its gradient through the row's backward kernel.

The rows are packed on the host in float64, as for sampling, and sent to the device as one tensor; their
gradient comes back as one. The forward pass keeps states and raw outputs, never a network graph: the
sweep back evaluates the network again, one row at a time, and calls one backward kernel a row for the
rest. `adjoint` does the same in plain torch operations, where rows do not serve: thresholding, tables of
a row a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .. import ops
from ..models.denoiser import Denoiser
from ..ops import layout
from ..ops.reference import NETWORK_DTYPES
from ..solvers.table import SolverTable
from ..support.transfer import rows_up
from .captured_calls import values_unread
from .steps import evaluate, guidance


def runs_in_rows(denoiser: Denoiser, table: SolverTable, x: Tensor) -> bool:
    """Whether the run is one of rows that all samples share, in dtypes that a row has."""
    if denoiser.dynamic_thresholding is not None or table.a.ndim != 1:
        return False
    return x.dtype in NETWORK_DTYPES and _input_dtype(denoiser, x) in NETWORK_DTYPES[x.dtype]


def _input_dtype(denoiser: Denoiser, x: Tensor) -> torch.dtype:
    """Dtype of the rows' network side, never wider than the state."""
    dtype = denoiser.network_dtype or x.dtype
    return x.dtype if dtype == torch.float64 else dtype


def solve_rows(
    denoiser: Denoiser, table: SolverTable, x: Tensor, **conditions: Any
) -> list[Tensor]:
    """`adjoint.solve` for what `runs_in_rows`."""
    rows, c_noise, first, scale = _packed(denoiser, table, x)
    later: tuple[Tensor, ...] = _Rows.apply(  # type: ignore[no-untyped-call]
        denoiser, conditions, x, rows, c_noise, first
    )
    return [scale * x, *later]


def _packed(
    denoiser: Denoiser, table: SolverTable, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ``[nfe, 6 + nfe]``, noise levels ``[nfe]``, first input's scale and the state's, there.

    As deep as there are rows: a ring in which no output is overwritten serves the way back too.
    """
    count = table.nfe
    pre = denoiser.preconditioning(table.times, table.prediction)
    scale = table.initial_scale.reshape(1)
    c_skip = torch.cat([pre.c_skip[:1] * scale, pre.c_skip[1:]])
    a = torch.cat([table.a[:1] * scale, table.a[1:]])
    c_in_next = torch.cat([pre.c_in[1:], torch.zeros_like(pre.c_in[:1])])
    b = pad(table.b, (0, count - table.depth)).tril()  # b[n, k] of an output there is not, k > n
    rows = layout.pack_rows(c_skip, pre.c_out, a, c_in_next, guidance(denoiser), b)
    whole = torch.cat([rows.reshape(-1), pre.c_noise, pre.c_in[:1] * scale, scale])
    sent = rows_up(whole.to(x.dtype), x.device)
    width = layout.row_width(count)
    flat, c_noise, first, scale = sent.split([count * width, count, 1, 1])
    return flat.reshape(count, width), c_noise, first.reshape(()), scale.reshape(())


class _Rows(torch.autograd.Function):
    """(x_1 .. x_nfe) = run(x, rows, c_noise, first)."""

    @staticmethod
    def forward(
        ctx: Any,
        denoiser: Denoiser,
        conditions: dict[str, Any],
        x: Tensor,
        rows: Tensor,
        c_noise: Tensor,
        first: Tensor,
    ) -> tuple[Tensor, ...]:
        count = rows.shape[0]
        ring = x.new_zeros((count, *x.shape))
        inputs = [(first * x).to(_input_dtype(denoiser, x))]
        states, outputs = [x], list[Tensor]()
        for n in range(count):
            f, f_cond = _branches(evaluate(denoiser, inputs[n], c_noise[n], conditions))
            state, m, following = ops.fused_row(f, f_cond, states[n], ring, rows[n])
            ring[n] = m
            states.append(state)
            inputs.append(following)
            outputs += [f] if f_cond is None else [f, f_cond]
        ctx.run = denoiser, conditions, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, c_noise, first, ring, *states[:-1], *inputs[:-1], *outputs)
        return tuple(states[1:])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        denoiser, conditions, count = ctx.run
        rows, c_noise, first, ring, *kept = ctx.saved_tensors
        states, inputs, flat = kept[:count], kept[count : 2 * count], kept[2 * count :]
        branches = len(flat) // count
        grad_rows, grad_noise = torch.zeros_like(rows), torch.zeros_like(c_noise)
        grad_ring = torch.zeros_like(ring)
        grad_x, grad_input = _or_zeros(grads[-1], states[0]), torch.zeros_like(inputs[0])
        for n in reversed(range(count)):
            f = flat[n * branches]
            f_cond = flat[n * branches + 1] if branches == 2 else None
            to_f, to_cond, grad_x, to_ring, grad_rows[n] = ops.fused_row_backward(
                grad_x, grad_ring[n], grad_input, f, f_cond, states[n], ring, rows[n]
            )
            grad_ring += to_ring
            cotangents = [to_f] if f_cond is None else [to_f, to_cond]
            grad_input, grad_noise[n] = _network_vjp(
                denoiser, conditions, inputs[n], c_noise[n], cotangents, ctx.needs_input_grad[4]
            )
            if n:
                extra = grads[n - 1]
                grad_x = grad_x if extra is None else grad_x + extra
        into = grad_input.to(grad_x.dtype)
        grad_first = (into * states[0]).sum(dtype=torch.float64).to(first.dtype)
        return None, None, grad_x + first * into, grad_rows, grad_noise, grad_first


def _branches(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return (output, None) if isinstance(output, Tensor) else output


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def _network_vjp(
    denoiser: Denoiser,
    conditions: dict[str, Any],
    network_input: Tensor,
    c_noise: Tensor,
    cotangents: list[Tensor],
    for_noise: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to the network's input and noise level: the only network graph, freed on return."""
    with torch.enable_grad(), values_unread(denoiser):
        x = network_input.detach().requires_grad_()
        level = c_noise.detach().clone().requires_grad_(for_noise)
        output = evaluate(denoiser, x, level, conditions)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    wanted = [x, level] if for_noise else [x]
    into = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    to_level = into[1] if for_noise else None
    return (
        torch.zeros_like(x) if into[0] is None else into[0].contiguous(),
        torch.zeros_like(level) if to_level is None else to_level,
    )
