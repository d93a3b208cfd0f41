"""DyWeight's weights (arXiv:2603.11607): weights of the noise history that need not add up to one.

    d_n     = (x_n - D(x_n; s_n l_n)) / l_n
    x_{n+1} = x_n + (t_{n+1} - l_n) sum_j w_nj d_j
    l_{n+1} = l_n + (t_{n+1} - l_n) sum_j w_nj,   l_0 = t_0

t_n is the grid, s_n scales the level the network is called at, and l_n is the level the state is
taken to be at: the excess of a row's weights moves the next one. On flows d_n is the network's
velocity at s_n l_n, undivided.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...policies.distilled import DistilledSolver
from ...processes import Process, RectifiedFlow
from ...solvers.table import SolverTable
from ...solvers.trace import Form
from ..restricted import Record, state_dict
from .contents import MOST_POINTS, Predictor, no_more, numbers, take
from .levels import LevelTrace, schedule, shifted_flow, unit_steps

GUARD = 1e-8
"""What the published sampler of noise levels adds to a level it divides by."""
FLUX_MU = 1.15
"""The shift's logarithm at 4,096 tokens (1024 x 1024 pixels), where the flow's files were trained."""


def is_dyweight(held: Any) -> bool:
    """A snapshot of the predictor, or the weights of the flow version."""
    if not isinstance(held, dict):
        return False
    module = held.get("predictor")
    return "dyweight_weights_raw" in held or (
        isinstance(module, Record) and module.kind == "DyWeight_predictor"
    )


def from_dyweight(held: Any, process: Process | None, options: dict[str, Any]) -> DistilledSolver:
    """The table of DyWeight's rows.

    Args:
        options: ``mu`` of the flow version: the logarithm of the shift of its grid.
    """
    if "dyweight_weights_raw" in held:
        return _flow(held, process, options)
    no_more(options)
    predictor = Predictor(held["predictor"], held.get("loss_fn"))
    process, afs = predictor.process(process), predictor.get("afs", bool)
    rows = predictor.points - 1
    tensors = state_dict(predictor.module)
    weights = numbers("hybrid_weights", tensors.get("hybrid_weights"), (rows, rows))
    weights = weights * numbers("mask", tensors.get("mask"), (rows, rows))
    scales = torch.ones(rows, dtype=torch.float64, device="cpu")
    if "t_scale" in tensors:
        scales[int(afs) :] = numbers("t_scale", tensors["t_scale"], (rows - int(afs),))
    kind = predictor.get("schedule_type", str, "polynomial")
    times = schedule(process, kind, predictor.get("schedule_rho", float, 7.0), rows + 1)
    table = weighted_table(process, times, weights, scales, afs=afs, guard=GUARD)
    return DistilledSolver(table, "dyweight", {"method": "dyweight", **predictor.notes()})


def _flow(held: Any, process: Process | None, options: dict[str, Any]) -> DistilledSolver:
    mu = take(options, "mu", FLUX_MU)
    no_more(options)
    weights = held["dyweight_weights_raw"]
    rows = len(weights) if isinstance(weights, Tensor) and weights.ndim == 2 else 0
    if not 1 <= rows < MOST_POINTS:
        raise ValueError("its dyweight_weights_raw is no square of weights")
    process = RectifiedFlow() if process is None else process
    times = shifted_flow(process, unit_steps(rows + 1), math.exp(float(mu)))
    scales = numbers("dyweight_t_scales", held.get("dyweight_t_scales"), (rows,))
    weights = numbers("dyweight_weights_raw", weights, (rows, rows))
    table = weighted_table(process, times, weights, scales, velocities=True)
    return DistilledSolver(table, "dyweight", {"method": "dyweight", "mu": float(mu)})


def weighted_table(
    process: Process,
    grid: Tensor,
    weights: Tensor,
    scales: Tensor,
    *,
    afs: bool = False,
    guard: float = 0.0,
    velocities: bool = False,
) -> SolverTable:
    """The rows above as a table.

    Args:
        grid: float64 ``[N + 1]`` in the process's time.
        weights: ``[N, N]``; row n weighs the directions 0 .. n, a zero does not read one.
        scales: ``[N]``, s_n.
        afs: the first direction is x / sqrt(1 + t_0^2).
        guard: added to a level that is divided by.
        velocities: the directions are those of flows.

    Raises:
        ValueError: weights of directions that come later, or a level that is not above zero.
    """
    if bool(torch.triu(weights, 1).any()):
        raise ValueError("its weights read directions that come later")
    trace = LevelTrace(process)
    x, level = trace.start(grid[0]), trace.level(grid[0])
    directions = list[Form]()
    for n, following in enumerate(trace.level(grid[1:])):
        if afs and n == 0:
            direction = x / torch.sqrt(1 + level**2)
        else:
            called = (scales[n] * level).abs()
            x, direction = trace.direction(x, called if velocities else level + guard, called)
        directions.append(direction)
        step = following - level
        for w, past in zip(weights[n], directions, strict=False):
            if bool(w != 0):
                x = x + past * (step * w)
        level = level + step * weights[n, : n + 1].sum()
    return trace.table(x, grid, "dyweight", afs="dockhorn" if afs else False)
