"""DEIS (Zhang & Chen 2023): Adams-Bashforth on noise, interpolated in time or in sigma / alpha."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..processes import EDM, VP, Process
from .common import Afs, Node, Run, check_order
from .ipndm import multistep
from .quadrature import lagrange_weights
from .table import Prediction, SolverTable


def deis(
    process: Process,
    grid: Tensor,
    *,
    order: int = 4,
    variant: Literal["tab", "rhoab"] = "tab",
    afs: Afs = False,
    network_times: Tensor | None = None,
    store: Prediction | None = None,
) -> SolverTable:
    """X' / alpha' = x / alpha + sum_k noise_{i-k} integral of L_k d(sigma / alpha) (eq. 14, 15).

    The integrals are exact (Gauss-Legendre to rounding) and differentiable.

    Args:
        grid: float64 ``[*batch, steps + 1]``, decreasing; may require grad.
        order: 1..4, one more than the degree ("tAB3" is order 4).
        variant: ``"tab"`` interpolates in the process's time (EDM: the VP time fitted to its
            range, as in ``grids.time_uniform``), ``"rhoab"`` in sigma / alpha (= ``ipndm_v``).
        afs, network_times, store: as for ``ipndm``.
    """
    if variant not in ("tab", "rhoab"):
        raise ValueError(f"variant is {variant!r}, expected 'tab' or 'rhoab'")
    clock = _clock(process) if variant == "tab" else None

    def weights(history: list[Node], end: Node) -> list[Tensor]:
        ratios = [node.ratio for node in history if node.ratio is not None]
        assert end.ratio is not None
        return lagrange_weights(ratios, end.ratio, clock, process.breakpoints())

    run = Run(
        process, grid, afs=afs, network_times=network_times, store=store, default_store="noise"
    )
    order = check_order(order, 4)
    last = multistep(run, order, weights)
    return run.table(last, "deis", order=order, variant=variant)


def _clock(process: Process) -> Callable[[Tensor], Tensor]:
    """Sigma / alpha -> the time DEIS interpolates in."""
    if isinstance(process, EDM):
        return VP.fitted(process.t_min, process.t_max).inverse_sigma
    return process.inverse_sigma
