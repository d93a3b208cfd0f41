"""Solvers written on noise levels, as tables: the coordinates most published learned solvers use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...processes import EDM, Process, RectifiedFlow, grids
from ...solvers.table import SolverTable
from ...solvers.trace import Form, Trace


class LevelTrace:
    """A run on X = x / alpha at levels sigma / alpha; a flow's is on x itself at its times.

    A network that is called at another level than the state's is given X scaled to that level, as in
    EDM's formulation of every process (Karras et al. 2022, section 2): the table then keeps the state
    at the scale of the level called.

    Args:
        process: of the network the table will run.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.flow = isinstance(process, RectifiedFlow)
        self._trace = Trace(process, "data" if self.flow else "noise")

    def level(self, t: Tensor) -> Tensor:
        """What the steps are measured in, at the process's time ``t``."""
        return t if self.flow else self.process.sigma_over_alpha(t)

    def start(self, t: Tensor) -> Form:
        """The state at the first time ``t``, unit noise times the level there."""
        x = self._trace.start()
        return x if self.flow else x / self.process.alpha(t)

    def direction(self, x: Form, level: Tensor, called: Tensor) -> tuple[Form, Form]:
        """(X, (X - D(X; called)) / level) after an evaluation at ``x``.

        Raises:
            ValueError: ``called`` is no level above zero.
        """
        if not bool(called.isfinite() & (called > 0)) or not bool(level != 0):
            raise ValueError(
                f"it calls the network at level {float(called)} for a state at {float(level)}, "
                "expected finite levels above 0"
            )
        if self.flow:
            out = self._trace.evaluate(x, called)
            return out.x, (out.x - out.data) / level
        t = self.process.inverse_sigma(called)
        alpha = self.process.alpha(t)
        out = self._trace.evaluate(x * alpha, t)
        return out.x / alpha, out.noise * (called / level)

    def table(self, x: Form, grid: Tensor, name: str, **options: Any) -> SolverTable:
        """The table that ends in ``x``, at ``grid[-1]``."""
        if not self.flow:
            x = x * self.process.alpha(grid[-1])
        made = self._trace.table(x, grid, name=name, options=options)
        return dataclasses.replace(made, name=name)


def schedule(process: Process, kind: str, rho: float, points: int) -> Tensor:
    """The diff-sampler family's grids, float64 ``[points]`` in the process's time.

    ``polynomial``, ``logsnr`` and ``time_uniform`` are those of EDM's levels over the range of the
    process; ``discrete`` is uniform in the model's own time.

    Raises:
        ValueError: unknown name, or the process has no such grid.
    """
    if kind == "discrete":
        return grids.discrete(process, points - 1, rho)
    if isinstance(process, RectifiedFlow):
        raise ValueError(f"its grid is {kind!r}, which a flow does not have")
    ends = [float(process.sigma_over_alpha(t)) for t in (process.t_min, process.t_max)]
    makers: dict[str, Callable[[Process], Tensor]] = {
        "polynomial": lambda levels: grids.polynomial(levels, points - 1, rho),
        "logsnr": lambda levels: grids.logsnr(levels, points - 1),
        "time_uniform": lambda levels: grids.time_uniform(levels, points - 1, rho),
    }
    if kind not in makers:
        raise ValueError(f"its grid is {kind!r}, expected one of {sorted([*makers, 'discrete'])}")
    times = process.inverse_sigma(makers[kind](EDM(*ends)))
    times[0], times[-1] = process.t_max, process.t_min
    return times


def shifted_flow(process: Process, levels: Tensor, shift: float) -> Tensor:
    """``levels`` of a flow moved towards noise (Esser et al. 2024, eq. 23)."""
    if not isinstance(process, RectifiedFlow):
        raise ValueError(f"it was made for a flow, the process is {type(process).__name__}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift is {shift}, expected a finite number > 0")
    return shift * levels / (1 + (shift - 1) * levels)


def unit_steps(points: int) -> Tensor:
    """1 to 0 in ``points`` float64 values."""
    return torch.linspace(1, 0, points, dtype=torch.float64, device="cpu")
