"""LD3's learned times (Tong et al. 2024, arXiv:2405.15506): a grid and the times of the network."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...policies.distilled import DistilledSolver
from ...processes import EDM, Process
from ...solvers.registry import make_solver
from .contents import MOST_POINTS, no_more, numbers, take

_SOLVERS = {
    "uni_pc": "unipc",
    "dpm_solver++": "dpm_solver_pp",
    "ipndm": "ipndm",
    "euler": "ipndm",  # of order 1: on levels a step along the noise predicted at the network's time
}
_REFUSED = {
    "heun": "its published loop evaluates at the grid's times and ignores the learned ones",
    "dpm_solver": "the ratios of its stages are not in the file",
}


def is_ld3(held: Any) -> bool:
    """A snapshot of the trainer."""
    return isinstance(held, dict) and {"params1", "params2", "best_t_steps"} <= set(held)


def from_ld3(held: Any, process: Process | None, options: dict[str, Any]) -> DistilledSolver:
    """The solver's table at the learned times.

    Args:
        process: None for EDM's, where the times are levels above 1.
        options: ``solver`` under the published name, its ``order``, and ``variant`` of uni_pc; none
            of them is in the file.

    Raises:
        ValueError: one of them is missing or unknown, or times that are no grid.
    """
    name = take(options, "solver")
    if name in _REFUSED:
        raise ValueError(f"solver {name!r} is not converted: {_REFUSED[name]}")
    if name not in _SOLVERS:
        raise ValueError(
            f"solver is {name!r}; the file holds times only: --set solver= one of {sorted(_SOLVERS)}"
        )
    grid, network = _times(held["best_t_steps"])
    if process is None:
        if not bool(grid[0] > 1):
            raise ValueError(
                "its times are a model's own, not noise levels: give the model (--model) or its process"
            )
        process = EDM(0.002, 80.0)
    if name == "euler" and not isinstance(process, EDM):
        raise ValueError("solver 'euler' steps in EDM's levels, and the process is another")
    settings = _settings(name, options)
    no_more(options)
    grid, network = (_ends(process, times) for times in (grid, network))
    table = make_solver(_SOLVERS[name], process, grid, network_times=network, **settings)
    named = {**table.options, "solver": table.name}
    described = {"method": "ld3", "solver": table.name, **settings}
    return DistilledSolver(dataclasses.replace(table, name="ld3", options=named), "ld3", described)


def _settings(name: str, options: dict[str, Any]) -> dict[str, Any]:
    needed = {"uni_pc": ("order", "variant"), "euler": ()}.get(name, ("order",))
    missing = [key for key in needed if key not in options]
    if missing:
        raise ValueError(f"the {missing[0]} of {name} is not in the file: --set {missing[0]}=")
    return {key: take(options, key) for key in needed} or {"order": 1}


def _times(both: Any) -> tuple[Tensor, Tensor]:
    count = len(both) if isinstance(both, Tensor) and both.ndim == 1 else 0
    if count % 2 or not 4 <= count <= 2 * MOST_POINTS:
        raise ValueError("its best_t_steps are not a grid and as many times of the network")
    grid, network = numbers("best_t_steps", both, (count,)).chunk(2)
    return grid, network


def _ends(process: Process, times: Tensor) -> Tensor:
    """Ends that single precision moved off the process's own are put back."""
    own = torch.tensor([process.t_max, process.t_min], dtype=torch.float64, device="cpu")
    moved = times.clone()
    near = (times[[0, -1]] - own).abs() <= 1e-5 * own
    moved[[0, -1]] = torch.where(near, own, times[[0, -1]])
    return moved
