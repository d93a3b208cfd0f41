"""DDIM (Song et al. 2021a, eq. 12 with eta = 0): Euler for the probability-flow ODE."""

from __future__ import annotations

from torch import Tensor

from ..processes import Process
from .common import Afs, Run
from .exponential import ExponentialStep, predicted
from .table import Prediction, SolverTable


def ddim(
    process: Process,
    grid: Tensor,
    *,
    prediction: Prediction = "data",
    afs: Afs = False,
    network_times: Tensor | None = None,
    store: Prediction | None = None,
) -> SolverTable:
    """One evaluation a step. Data and noise forms differ only with decoupled ``network_times``.

    Args:
        grid: float64 ``[*batch, steps + 1]``, decreasing; may require grad.
        prediction: which prediction is held constant over a step.
        afs: analytical first step (False, True, "dockhorn", "zero"): one evaluation less.
        network_times: decoupled times, shaped like ``grid``.
        store: what the table's history holds; None for ``prediction``.
    """
    run = Run(
        process,
        grid,
        afs=afs,
        network_times=network_times,
        store=store,
        default_store=prediction,
    )
    x = run.start()
    for i in range(run.steps):
        step = ExponentialStep(run.nodes[i], run.nodes[i + 1], prediction)
        out = run.evaluate(x, i)
        x = out.x * step.base + predicted(out, prediction) * step.first
    return run.table(x, "ddim", prediction=prediction)
