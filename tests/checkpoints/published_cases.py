"""Numbers for files of published learned solvers, and what a solver made of them samples."""

from __future__ import annotations

import published_rules as rules
import torch
from analytic import GaussianMixture, run_table
from torch import Tensor

from dlms_engine.policies.distilled import DistilledSolver
from dlms_engine.processes import Process

AGREES = 1e-6
EPD_HEUN = {
    "dataset_name": "cifar10", "num_steps": 5, "num_points": 2, "sampler_stu": "heun", "afs": False,
    "schedule_type": "polynomial", "schedule_rho": 7.0,
}  # fmt: skip
IPNDM = {"solver": "ipndm", "order": 2}


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


def noise() -> Tensor:
    return values(4, 16, seed=9).double()


def sample(solver: DistilledSolver, process: Process | None = None) -> Tensor:
    """Of the mixture, from the noise at the solver's start, over alpha at its end."""
    table = solver.table()
    assert table.process == (process or table.process)
    x = table.process.sigma(table.t_start) * noise()
    return run_table(table, GaussianMixture(table.process), x) / table.process.alpha(table.t_end)


def agree(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= AGREES * wanted.abs().max())


def dyweight_weights(rows: int) -> Tensor:
    weights = torch.tril(values(rows, rows, scale=0.2)) + torch.eye(rows)
    weights[rows - 1, 0] = 0.0  # outside of a window
    return weights


def epd_parameters(steps: int, points: int) -> dict[str, Tensor]:
    names = ("r_params", "scale_dir_params", "scale_time_params", "weight_s")
    return {name: values(steps, points, seed=i) for i, name in enumerate(names)}


def ld3_times(points: int) -> tuple[Tensor, Tensor]:
    grid = rules.powers(points)
    moved = grid * (1 + 0.05 * values(points, seed=3).double())
    moved[0], moved[-1] = grid[0], grid[-1]
    return grid, moved
