"""Where DLMS starts: grids, multistep weights, network times."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...policies.dlms import step_coefficients
from ...processes import Process, as_float64
from ...solvers.ipndm import ADAMS_BASHFORTH
from ...solvers.registry import make_solver
from .teacher import multistep_weights

if TYPE_CHECKING:
    from ..training.start_times import StartTimes
    from .settings import DlmsSettings

_log = logging.getLogger("dlms_engine")


def initial_weights(process: Process, grid: Tensor, settings: DlmsSettings) -> Tensor:
    """float64 ``[steps, order]``: row n-1 holds step n's weights, newest first, sum 1.

    Raises:
        ValueError: the solver of ``settings.init`` cannot start or end where ``grid`` does.
    """
    steps, order = settings.steps, settings.resolved_order
    if settings.init in ("deis", "unipc"):
        return _weights_of_rows(process, grid, settings)
    weights = torch.zeros(steps, order, dtype=torch.float64, device="cpu")
    for n in range(1, steps + 1):
        row = _row(process, grid, settings, n, min(n, order))
        weights[n - 1, : len(row)] = as_float64(row)
    return weights


def initial_scales(times: StartTimes, scale_range: float, gain: float) -> Tensor:
    """float32 ``[steps]``: what the head must say for the network times of ``times``.

    A scaling lies within 1 +- ``scale_range``; one that does not is cut, and named in the log, to 95 %
    of that, where the head can still move.
    """
    assert times.network is not None
    grid, network = times.grid[1:-1], times.network[1:-1]
    wanted = network / grid - 1
    bound = 0.95 * scale_range
    worst = float(wanted.abs().max()) if len(wanted) else 0.0
    if worst > bound:
        _log.warning(
            "the grid's network times are up to %.0f %% off their grid times, scale_range=%g keeps "
            "%.0f %%: set scale_range=%.2g to start from them exactly",
            100 * worst, scale_range, 100 * bound, worst / 0.9,
        )  # fmt: skip
    raw = torch.zeros(
        len(times.grid) - 1, dtype=torch.float32, device="cpu"
    )  # the last step's scaling is never used
    if scale_range > 0 and gain > 0:
        share = (wanted / scale_range).clamp(-0.95, 0.95)
        raw[:-1] = torch.atanh(share).float() / gain
    return raw


def _weights_of_rows(process: Process, grid: Tensor, settings: DlmsSettings) -> Tensor:
    """A handcrafted solver's rows as weights: b over the gain of a first-order step (Eq. 8, 9).

    Every output counts as evaluated, the analytical first step's too.
    """
    table = make_solver(
        settings.init, process, as_float64(grid), order=settings.solver_order,
        store=settings.prediction,
    )  # fmt: skip
    carry, gain = step_coefficients(process, settings.prediction, grid[:-1], grid[1:])
    # the row's own a is that of a first-order step: nothing of the state is lost in the weights
    assert torch.allclose(table.a, carry, rtol=1e-9, atol=1e-12)
    weights = torch.zeros(
        settings.steps, settings.resolved_order, dtype=torch.float64, device="cpu"
    )
    weights[:, : table.depth] = table.b / gain[:, None]
    return weights


def _row(
    process: Process, grid: Tensor, settings: DlmsSettings, n: int, available: int
) -> tuple[float, ...] | Tensor:
    if settings.init == "ddim":
        return (1.0,)
    if settings.init in ("ab", "ipndm"):
        return ADAMS_BASHFORTH[min(available, 4)]
    # DPM-Solver++ with lower order at the end, as the handcrafted solver has it
    order = min(available, 3, settings.steps - n + 1)
    lambdas = process.lambda_(grid)
    history = [lambdas[n - 1 - k] for k in range(order)]
    return torch.stack(multistep_weights(lambdas[n] - lambdas[n - 1], history))
