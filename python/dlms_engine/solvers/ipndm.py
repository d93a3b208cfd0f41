"""iPNDM (Zhang & Chen 2023, section 4.1) and its variable-step form: Adams-Bashforth on noise."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..processes import Process
from .common import Afs, Node, Run, check_order, noise_step
from .exponential import ExponentialStep
from .quadrature import lagrange_weights
from .table import Prediction, SolverTable
from .trace import Form

# Fixed-step Adams-Bashforth, newest first (Hairer, Norsett & Wanner 1993, III.1).
ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

Weights = Callable[[list[Node], Node], list[Tensor]]


def ipndm(
    process: Process,
    grid: Tensor,
    *,
    order: int = 4,
    afs: Afs = False,
    network_times: Tensor | None = None,
    store: Prediction | None = None,
) -> SolverTable:
    """Constant Adams-Bashforth weights on any grid, order min(order, evaluations so far).

    Args:
        grid: float64 ``[*batch, steps + 1]``, decreasing; may require grad.
        order: 1..4.
        afs: analytical first step (False, True, "dockhorn", "zero"): one evaluation less.
        network_times: decoupled times, shaped like ``grid``.
        store: what the table's history holds; None for noise, or data from a start at alpha = 0.
    """

    def weights(history: list[Node], end: Node) -> list[Tensor]:
        width = _change(history[0], end)
        return [width * b for b in ADAMS_BASHFORTH[len(history)]]

    run = Run(
        process, grid, afs=afs, network_times=network_times, store=store, default_store="noise"
    )
    order = check_order(order, 4)
    return run.table(multistep(run, order, weights), "ipndm", order=order)


def ipndm_v(
    process: Process,
    grid: Tensor,
    *,
    order: int = 4,
    afs: Afs = False,
    network_times: Tensor | None = None,
    store: Prediction | None = None,
) -> SolverTable:
    """Variable-step Adams-Bashforth in sigma / alpha: exact integrals of the interpolant.

    Same arguments as ``ipndm``. Codes in circulation differ from order 3 up, where their weights
    do not integrate the interpolant (and at order 4 do not add up to the step).
    """

    def weights(history: list[Node], end: Node) -> list[Tensor]:
        ratios = [node.ratio for node in history if node.ratio is not None]
        assert end.ratio is not None
        return lagrange_weights(ratios, end.ratio)

    run = Run(
        process, grid, afs=afs, network_times=network_times, store=store, default_store="noise"
    )
    order = check_order(order, 4)
    return run.table(multistep(run, order, weights), "ipndm_v", order=order)


def multistep(run: Run, order: int, weights: Weights) -> Form:
    """X' / alpha' = x / alpha + sum_k w_k noise_{i-k}; returns the last state.

    ``weights`` maps the history's nodes (newest first) and the step's end to the w_k, whose sum is
    the change of sigma / alpha. A start at alpha = 0 is left by a DDIM step and not interpolated.
    """
    x, history, nodes = run.start(), list[Form](), list[Node]()
    for i in range(run.steps):
        start, end = run.nodes[i], run.nodes[i + 1]
        out = run.evaluate(x, i)
        if start.first:
            step = ExponentialStep(start, end, "data")
            x = out.x * step.base + out.data * step.first
            continue
        history, nodes = [out.noise, *history][:order], [start, *nodes][:order]
        if len(history) == 1:
            x = noise_step(start, end, out.x, history[0])
            continue
        x = out.x * (end.alpha / start.alpha)
        for form, w in zip(history, weights(nodes, end), strict=True):
            x = x + form * (end.alpha * w)
    return x


def _change(start: Node, end: Node) -> Tensor:
    assert start.ratio is not None and end.ratio is not None
    return end.ratio - start.ratio
