"""The general table: a handcrafted closed form at learned times, plus corrections that start at zero.

    (a, b)_n = closed form of the base at the grid t(theta) + unit_n * (corrections of row n)
    tau_n    = t_n moved by a learned offset                   the time the network is called with
    x_0      = exp(scale) * initial scale * noise

Row n may weigh every earlier output. Without training it is the base, to the bit. The
parameterisation is that of Generalized Solvers (GS, ICLR 2026), whose ablation shows coefficients
without the closed form to be much worse, with the first evaluation's time and the start's scale
added. In Gauss-Newton steps the coordinates hardly matter; the closed form is what moves all
coefficients rightly when a time moves far.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...policies.dlms import step_coefficients
from ...solvers.table import SolverTable
from ..start import Candidate, Start

FULL_HISTORY = 6
"""Evaluations up to which a row weighs all earlier outputs; above, the newest four."""
NEWEST = 4


def bases(start: Start, several: bool) -> list[Candidate]:
    """Where the table's fit starts: the best solver and, for a few iterations, the best of another
    kind of step, as what is best untrained is not always best trained.
    """
    best = start.best
    if not several:
        return [best]
    limit = 1.5 * start.ranking[0].rmse
    for measured in start.ranking[1:]:
        other = measured.candidate
        same_kind = (other.solver, other.stages) == (best.solver, best.stages)
        if other.stages == 1 and not same_kind and measured.rmse <= limit:
            return [best, other]
    return [best]


class GeneralTable:
    """Maps parameters, float64 ``[size]`` on the host, to tables.

    Args:
        base: the handcrafted solver that the zero vector gives.
        depth: outputs a row may weigh; None for all up to six evaluations, else four.
        scaled: whether the start may be scaled.

    Attributes:
        groups: name -> slice of the parameters: ``grid`` (interior times, in units of the smaller
            gap beside each), ``times`` (offsets of the network's times, same unit), ``outputs``,
            ``state`` (in units of a row's first-order weight) and ``scale``.
    """

    def __init__(self, base: Candidate, depth: int | None = None, scaled: bool = True) -> None:
        self.base = base
        self.process = process = base.table.process
        table = base.table.detach()
        self.nfe = table.nfe
        if depth is None:
            depth = self.nfe if self.nfe <= FULL_HISTORY else NEWEST
        self.depth = min(self.nfe, max(depth, table.depth))
        self._grid = table.grid
        self._skipped = len(table.grid) - 1 - table.nfe  # rows start here: 1 with AFS
        self._closed = base.stages == 1 and self._skipped in (0, 1)
        lambda_ = process.lambda_(table.grid)
        self._logarithmic = bool(torch.isfinite(lambda_[[0, -1]]).all())
        self._places = [(n, k) for n in range(self.nfe) for k in range(min(n + 1, self.depth))]
        sizes = {
            "grid": len(self._grid) - 2 if self._closed else 0,
            "times": self.nfe,
            "outputs": len(self._places),
            "state": self.nfe,
            "scale": int(scaled),
        }
        self.groups: dict[str, slice] = {}
        first = 0
        for name, size in sizes.items():
            self.groups[name] = slice(first, first + size)
            first += size
        self.size = first

    def zero(self) -> Tensor:
        """The base's parameters."""
        return torch.zeros(self.size, dtype=torch.float64, device="cpu")

    def table(self, parameters: Tensor) -> SolverTable | None:
        """The table of ``parameters``; None where the times are not in order any more, or a weight is
        not finite.
        """
        part = {name: parameters[where] for name, where in self.groups.items()}
        made = self._closed_form(part) if self._closed else self._frozen(part)
        if made is None:
            return None
        table, unit, state_unit = made
        b = torch.nn.functional.pad(table.b, (0, self.depth - table.depth))
        rows = torch.tensor([n for n, _ in self._places], device="cpu")
        columns = torch.tensor([k for _, k in self._places], device="cpu")
        b[rows, columns] += unit[rows] * part["outputs"]
        options: dict[str, Any] = {**table.options, "solver": table.name, "base": self.base.label}
        a = table.a + state_unit * part["state"]
        if not bool(a.isfinite().all() and b.isfinite().all()):
            return None
        return dataclasses.replace(
            table,
            a=a,
            b=b,
            initial_scale=table.initial_scale * torch.exp(part["scale"].sum()),
            name="auto",
            options=options,
        )

    # -- times -------------------------------------------------------------------------------------

    def _coordinate(self, t: Tensor) -> Tensor:
        """Rises as t falls: lambda_, or -t where lambda_ is infinite at an end."""
        return self.process.lambda_(t) if self._logarithmic else -t

    def _time(self, u: Tensor) -> Tensor:
        return self.process.inverse_lambda(u) if self._logarithmic else -u

    def _closed_form(self, part: dict[str, Tensor]) -> tuple[SolverTable, Tensor, Tensor] | None:
        u = self._coordinate(self._grid)
        gaps = u.diff()
        moved = u.clone()
        moved[1:-1] += part["grid"] * torch.minimum(gaps[:-1], gaps[1:])
        if not bool((moved.diff() > 0).all()):
            return None
        inner = torch.where(part["grid"] == 0, self._grid[1:-1], self._time(moved[1:-1]))
        grid = torch.cat([self._grid[:1], inner, self._grid[-1:]])
        network = self._network_times(moved, part["times"])
        if not bool((grid.diff() < 0).all()):
            return None
        told = torch.cat([grid[: self._skipped], network, grid[-1:]])
        try:
            table = self.base.at(grid, told).detach()
        except ValueError:
            return None
        t, t_next = grid[self._skipped : -1], grid[self._skipped + 1 :]
        _, unit = step_coefficients(self.process, table.prediction, t, t_next)
        return table, unit, unit / self._norm(t)

    def _network_times(self, u: Tensor, offsets: Tensor) -> Tensor:
        gaps = u.diff()
        near = torch.cat([gaps[:1], torch.minimum(gaps[:-1], gaps[1:])])
        rows = slice(self._skipped, self._skipped + self.nfe)
        moved = u[rows] + offsets * near[rows]
        times = self._time(moved)
        # a time that did not move keeps its bits, and with them the shared evaluations
        same = (offsets == 0) & (u[rows] == self._coordinate(self._grid)[rows])
        times = torch.where(same, self._grid[rows], times)
        return times.clamp(self.process.t_min, self.process.t_max)

    def _frozen(self, part: dict[str, Tensor]) -> tuple[SolverTable, Tensor, Tensor] | None:
        """Solvers with stages between the grid's times: their coefficients stay."""
        table = self.base.table.detach()
        u = self._coordinate(self._grid)
        step = float(u.diff().abs().min()) / 2
        inner = self._coordinate(table.times) if self._logarithmic else -table.times
        moved = self._time(inner + part["times"] * step)
        times = torch.where(part["times"] == 0, table.times, moved)
        times = times.clamp(self.process.t_min, self.process.t_max)
        unit = table.b.abs().sum(1)
        return dataclasses.replace(table, times=times), unit, unit / self._norm(table.times)

    def _norm(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.process.alpha(t) ** 2 + self.process.sigma(t) ** 2)
