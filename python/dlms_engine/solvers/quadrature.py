"""Integrals of Lagrange interpolants, differentiable in every argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

NODES = 16
# sigma / alpha: panels at powers of two resolve the branch points of every smooth process
PANELS = torch.cat(
    [
        torch.zeros(1, dtype=torch.float64, device="cpu"),
        2.0 ** torch.arange(-24.0, 16.0, device="cpu").double(),
    ]
)


@cache
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], float64 ``[count]`` (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0] ** 2


def lagrange(points: list[Tensor], at: Tensor) -> list[Tensor]:
    """Lagrange basis over ``points`` (each ``[*batch]``) at ``at`` ``[*batch, n]``."""
    basis = []
    for j, own in enumerate(points):
        value = torch.ones_like(at)
        for k, other in enumerate(points):
            if k != j:
                value = value * ((at - other[..., None]) / (own - other)[..., None])
        basis.append(value)
    return basis


def lagrange_weights(
    points: list[Tensor],
    end: Tensor,
    clock: Callable[[Tensor], Tensor] | None = None,
    breakpoints: Tensor | None = None,
) -> list[Tensor]:
    """w_j = integral from points[0] to ``end`` of the j-th Lagrange basis.

    Args:
        points: values of r = sigma / alpha of the history, newest first, each ``[*batch]``.
        end: r at the end of the step, below ``points[0]``.
        clock: time of the interpolation as a function of r; None for r itself, where the
            quadrature is exact.
        breakpoints: r between which ``clock`` is smooth (default: powers of two).
    """
    start = points[0]
    x, w = gauss_legendre(NODES)
    if clock is None:
        edges = torch.stack([end, start], dim=-1)
        clock = _identity
    else:
        inner = PANELS if breakpoints is None else breakpoints
        inner = inner[(inner > end.detach().min()) & (inner < start.detach().max())]
        low, high = end[..., None], start[..., None]
        inner = torch.maximum(torch.minimum(inner, high), low)
        edges = torch.cat([low, inner, high], dim=-1)
    half = edges.diff(dim=-1)[..., None] / 2
    middle = edges[..., :-1, None] + half
    at = (middle + half * x).flatten(-2)
    weight = (half * w).flatten(-2)
    basis = lagrange([clock(point) for point in points], clock(at))
    return [-(value * weight).sum(dim=-1) for value in basis]


def _identity(r: Tensor) -> Tensor:
    return r
