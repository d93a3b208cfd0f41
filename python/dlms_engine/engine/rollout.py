"""Differentiable runs of a table, for the learners: gradients reach x, a, b and the times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.denoiser import Denoiser, per_sample
from ..solvers.table import SolverTable
from ..support.transfer import rows_up


def on_device(table: SolverTable, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, times, initial_scale) of ``table`` on ``device``, sent there as one tensor."""
    parts = (table.a, table.b, table.times, table.initial_scale)
    if all(part.device == device for part in parts):
        return parts
    sent = rows_up(torch.cat([part.reshape(-1) for part in parts]), device)
    pieces = sent.split([part.numel() for part in parts])
    a, b, times, scale = (p.reshape(q.shape) for p, q in zip(pieces, parts, strict=True))
    return a, b, times, scale


def rollout(
    denoiser: Denoiser,
    table: SolverTable,
    x: Tensor,
    *,
    rematerialise: bool = False,
    **cond: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Runs ``table`` keeping the autograd graph.

    Args:
        x: ``[B, ...]`` the state at the start.
        rematerialise: recompute each network evaluation in backward, so that memory does not
            grow with a network graph per evaluation.

    Returns:
        the end state, the states before each evaluation, and the ring quantities ``m``.
    """
    a, b, times, scale = on_device(table, x.device)
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    x = per_sample(scale, x) * x
    for n in range(table.nfe):
        states.append(x)
        t = times[..., n]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return denoiser.predict(x, t, table.prediction, **cond)

        if rematerialise and torch.is_grad_enabled():
            m = checkpoint(predict, x, t, use_reentrant=False, preserve_rng_state=False)
        else:
            m = predict(x, t)
        outputs.append(m)
        x = per_sample(a[..., n], x) * x
        for k in range(min(table.depth, n + 1)):
            x = x + per_sample(b[..., n, k], x) * outputs[n - k]
    return x, states, outputs
