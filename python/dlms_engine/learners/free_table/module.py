"""The trained parameters of a free table."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ...models.denoiser import Denoiser
from ...policies.dlms import step_coefficients
from ...processes.grids import default_grid
from ...solvers.table import SolverTable
from ..ld3.grid import LearnedGrid
from ..training.start_times import start_times
from .settings import FreeTableSettings


class FreeTableModule(nn.Module):
    """The parameters of a free table and the table they make; float64.

    Attributes:
        times: grid and network times.
        outputs: ``[nfe, depth]`` corrections of the output weights, in units of the row's
            first-order weight; without effect where a row has no output that old.
        state: ``[nfe]`` corrections of the state's weight, in the same unit at unit variance.
    """

    mask: Tensor

    def __init__(self, denoiser: Denoiser, settings: FreeTableSettings) -> None:
        super().__init__()
        process = self.process = denoiser.process
        self.settings = settings
        source = default_grid(process) if settings.grid is None else settings.grid
        start = start_times(process, source, settings.steps)
        self.times = LearnedGrid(
            process, start.grid, network_times=start.network, window=settings.window
        )
        with torch.no_grad():
            base = self.base_table()
        depth = settings.nfe if settings.depth is None else min(settings.depth, settings.nfe)
        self.depth = max(depth, base.depth)
        self.outputs = nn.Parameter(
            torch.zeros(settings.nfe, self.depth, dtype=torch.float64, device="cpu")
        )
        self.state = nn.Parameter(torch.zeros(settings.nfe, dtype=torch.float64, device="cpu"))
        rows, columns = (
            torch.arange(settings.nfe, device="cpu")[:, None],
            torch.arange(self.depth, device="cpu"),
        )
        self.register_buffer("mask", ((columns <= rows) & (columns < depth)).to(torch.float64))

    def base_table(self) -> SolverTable:
        """The handcrafted table at the present times."""
        times = self.times()
        return self.settings.solver.table(self.process, times.grid, times.network)

    def forward(self) -> SolverTable:
        """The corrected table, differentiable in all parameters."""
        table = self.base_table()
        skipped = self.settings.steps - self.settings.nfe
        t, t_next = table.grid[skipped:-1], table.grid[skipped + 1 :]
        _, unit = step_coefficients(self.process, table.prediction, t, t_next)
        norm = torch.sqrt(self.process.alpha(t) ** 2 + self.process.sigma(t) ** 2)
        corrections = self.outputs * self.mask
        if self.settings.sum_to_base:
            corrections = corrections - self.mask * (
                corrections.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)
            )
        b = torch.nn.functional.pad(table.b, (0, self.depth - table.depth))
        return dataclasses.replace(
            table,
            a=table.a + unit / norm * self.state,
            b=b + unit[:, None] * corrections,
            name="free_table",
            options={**table.options, "solver": table.name},
        )
