"""Solver settings and processes that the solver tests run over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlms_engine import grids
from dlms_engine.processes import EDM, VP, Cosine, Process, RectifiedFlow, VPDiscrete
from dlms_engine.solvers import SOLVERS, make_solver
from dlms_engine.solvers.table import SolverTable

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
PROCESSES = {
    "edm": EDM(),
    "edm to 0": EDM(t_min=0.0),
    "vp": VP(),
    "discrete": VPDiscrete(betas=BETAS),
    "discrete to 0": VPDiscrete(betas=BETAS, t_min=0.0),
    "cosine": Cosine(),
    "flow": RectifiedFlow(),
    "flow inside": RectifiedFlow(0.02, 0.98),
}
CONFIGS = {
    "/".join([name, *(f"{key}={value}" for key, value in options.items())]): (name, options)
    for name, solver in SOLVERS.items()
    for options in solver.variants
}
CONFIGS["ddim/noise"] = ("ddim", {"prediction": "noise"})
CONFIGS["dpm_solver_pp/noise"] = ("dpm_solver_pp", {"order": 3, "prediction": "noise"})
CONFIGS["unipc/noise"] = ("unipc", {"order": 3, "prediction": "noise"})
CONFIGS["deis/rhoab"] = ("deis", {"order": 3, "variant": "rhoab"})
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_config = pytest.mark.parametrize(
    ("name", "options"), CONFIGS.values(), ids=[key.replace("/", " ") for key in CONFIGS]
)


SHORT = {
    key: CONFIGS[key]
    for key in (
        "ddim",
        "ipndm/order=4",
        "ipndm_v/order=3",
        "deis/order=3",
        "dpm_solver_pp/order=3/lower_order_final=False",
        "unipc/order=3/variant=bh1/lower_order_final=False",
        "unipc/order=3/variant=bh2/lower_order_final=True",
        "dpm_solver_pp_2s",
        "dpm_solver_2",
        "heun",
        "dpm_solver_pp/noise",
        "unipc/noise",
    )
}
short_config = pytest.mark.parametrize(
    ("name", "options"), SHORT.values(), ids=[key.replace("/", " ") for key in SHORT]
)


def make(name: str, process: Process, steps: int, **options: Any) -> SolverTable:
    return make_solver(name, process, grids.time_uniform(process, steps), **options)


def impossible(process: Process, options: dict[str, Any]) -> bool:
    return options.get("prediction") == "noise" and float(process.alpha(process.t_max)) == 0


def start_state(process: Process, grid: Tensor, like: Tensor) -> Tensor:
    return process.alpha(grid[0]) * 0.3 + process.sigma(grid[0]) * like
