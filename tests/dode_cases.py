"""D-ODE on the Gaussian mixture: the solvers it corrects, the problem, its ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from analytic import GaussianMixture
from torch import Tensor

from dlms_engine.engine.adjoint import walk
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import Process
from dlms_engine.solvers.table import SolverTable

SOLVERS: list[dict[str, Any]] = [
    {"solver": "ddim", "prediction": "noise"},
    {"solver": "ddim", "prediction": "data"},
    {"solver": "ipndm"},
    {"solver": "deis", "order": 3},
    {"solver": "dpm_solver_pp", "order": 3},
    {"solver": "dpm_solver", "order": 2},
    {"solver": "dpm_solver", "order": 3},
    {"solver": "dpm_solver", "order": 3, "prediction": "data"},
    {"solver": "edm"},
]


def problem(process: Process) -> tuple[GaussianMixture, Denoiser]:
    network = GaussianMixture(process)
    return network, Denoiser(network, process, "data")


def end(denoiser: Denoiser, table: SolverTable, x: Tensor) -> Tensor:
    return list(walk(denoiser, table, x))[-1][2]


def unit(seed: int, count: int = 8) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 16)))


def worst(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
