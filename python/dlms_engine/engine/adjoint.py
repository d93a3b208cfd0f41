"""Gradients of a table's run by a reverse sweep: one network graph at a time, whatever the nfe.

The forward pass keeps states and outputs, never a network graph. The sweep walks the rows backwards
with a cotangent per output: once every row that reads m_n has been visited, one VJP of the network
at (x_n, t_n) carries it on. That is one recomputation per evaluation, against one per (evaluation,
row) for the rematerialisation of LD3 (Tong et al. 2024, Appendix B.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.denoiser import Denoiser, per_sample
from ..solvers.table import Prediction, SolverTable
from ..support.transfer import rows_up
from . import fused_adjoint
from .captured_calls import values_unread


def solve(denoiser: Denoiser, table: SolverTable, x: Tensor, **conditions: Any) -> list[Tensor]:
    """Runs ``table``; gradients reach ``x``, ``a``, ``b``, ``times`` and ``initial_scale``.

    Args:
        x: ``[B, ...]`` the state at the table's start.

    Returns:
        the states x_0 .. x_nfe, each like ``x``; losses may use any. First derivatives only.
    """
    if fused_adjoint.runs_in_rows(denoiser, table, x):
        return fused_adjoint.solve_rows(denoiser, table, x, **conditions)
    numbers = on_device(table, x.device)
    states: tuple[Tensor, ...] = _Solve.apply(  # type: ignore[no-untyped-call]
        denoiser, table.prediction, conditions, x, *numbers
    )
    return list(states)


def on_device(table: SolverTable, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, times, initial_scale) of ``table`` on ``device``, sent there as one tensor."""
    parts = (table.a, table.b, table.times, table.initial_scale)
    if all(part.device == device for part in parts):
        return parts
    sent = rows_up(torch.cat([part.reshape(-1) for part in parts]), device)
    pieces = sent.split([part.numel() for part in parts])
    a, b, times, scale = (p.reshape(q.shape) for p, q in zip(pieces, parts, strict=True))
    return a, b, times, scale


def walk(
    denoiser: Denoiser, table: SolverTable, x: Tensor, **conditions: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(state before row n, output m_n, state after row n) for each row; keeps what a row reads.

    Where gradients are on, autograd keeps a network graph a row: ``solve`` needs one at a time.
    """
    history: list[Tensor] = []
    a, b, times, scale = on_device(table, x.device)
    x = per_sample(scale, x) * x
    for n in range(table.nfe):
        m = denoiser.predict(x, times[..., n], table.prediction, **conditions)
        history = [m, *history][: table.depth]
        following = per_sample(a[..., n], x) * x
        for k, past in enumerate(history):
            following = following + per_sample(b[..., n, k], x) * past
        yield x, m, following
        x = following


class _Solve(torch.autograd.Function):
    """states = run(x, a, b, times, initial_scale)."""

    @staticmethod
    def forward(
        ctx: Any,
        denoiser: Denoiser,
        prediction: Prediction,
        conditions: dict[str, Any],
        x: Tensor,
        a: Tensor,
        b: Tensor,
        times: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, depth = a.shape[-1], b.shape[-1]
        states, outputs = [per_sample(scale, x) * x], list[Tensor]()
        for n in range(rows):
            outputs.append(denoiser.predict(states[n], times[..., n], prediction, **conditions))
            following = per_sample(a[..., n], x) * states[n]
            for k in range(min(depth, n + 1)):
                following = following + per_sample(b[..., n, k], x) * outputs[n - k]
            states.append(following)
        ctx.run = denoiser, prediction, conditions, rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, b, times, scale, *states[:-1], *outputs)
        return tuple(states)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        denoiser, prediction, conditions, rows = ctx.run
        x, a, b, times, scale, *kept = ctx.saved_tensors
        states, outputs = kept[:rows], kept[rows:]
        _, _, _, _, for_a, for_b, for_times, for_scale = ctx.needs_input_grad
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        grad_times = torch.zeros_like(times)
        cotangents: list[Tensor | None] = [None] * rows
        v = grads[rows] if grads[rows] is not None else torch.zeros_like(x)
        assert v is not None
        for n in reversed(range(rows)):
            if for_a:
                grad_a[..., n] = _inner(v, states[n], a[..., n])
            for k in range(min(b.shape[-1], n + 1)):
                j = n - k
                if for_b:
                    grad_b[..., n, k] = _inner(v, outputs[j], b[..., n, k])
                part = per_sample(b[..., n, k], v) * v
                held = cotangents[j]
                cotangents[j] = part if held is None else held + part
            v = per_sample(a[..., n], v) * v
            cotangent = cotangents[n]
            assert cotangent is not None
            cotangents[n] = None
            grad_x, grad_t = _network_vjp(
                denoiser, prediction, conditions, states[n], times[..., n], cotangent, for_times
            )
            v = v + grad_x
            if grad_t is not None:
                grad_times[..., n] = grad_t
            extra = grads[n]
            v = v if extra is None else v + extra
        grad_scale = _inner(v, x, scale) if for_scale else None
        return (
            None,
            None,
            None,
            per_sample(scale, v) * v,
            grad_a if for_a else None,
            grad_b if for_b else None,
            grad_times if for_times else None,
            grad_scale,
        )


def _network_vjp(
    denoiser: Denoiser,
    prediction: Prediction,
    conditions: dict[str, Any],
    x: Tensor,
    t: Tensor,
    cotangent: Tensor,
    for_time: bool,
) -> tuple[Tensor, Tensor | None]:
    """cotangent^T d m / d (x, t): the only network graph of the sweep, freed on return."""
    with torch.enable_grad(), values_unread(denoiser):
        x = x.detach().requires_grad_()
        t = t.detach().clone().requires_grad_(for_time)
        m = denoiser.predict(x, t, prediction, **conditions)
    wanted = [x, t] if for_time else [x]
    found = torch.autograd.grad(m, wanted, cotangent, allow_unused=True)
    grad_x = torch.zeros_like(x) if found[0] is None else found[0]
    return grad_x, found[1] if for_time else None


def _inner(u: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """<u, v> in float64, over all samples or per sample as ``like`` is ``[]`` or ``[B]``."""
    product = u * v
    if like.ndim == 0:
        return product.sum(dtype=torch.float64).to(like.device)
    return product.flatten(1).sum(1, dtype=torch.float64).to(like.device)
