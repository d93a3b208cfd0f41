"""Settings of D-ODE solvers and the grids and orders that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...processes import EDM, Process, VPDiscrete, grids
from ...solvers.table import Prediction
from ..training.coerce import check_choices, check_least
from ..training.conclude import Keep
from ..training.start_times import GridSource, start_times

HIGHEST = {"ddim": 1, "ipndm": 4, "deis": 4, "dpm_solver_pp": 3, "dpm_solver": 3, "edm": 1}
USUAL = {"ddim": 1, "ipndm": 4, "deis": 4, "dpm_solver_pp": 2, "dpm_solver": 2, "edm": 1}


@dataclass(frozen=True)
class DodeSettings:
    """Settings of a D-ODE solver (Kim et al. 2024, arXiv:2309.16421, supplement).

    Attributes:
        nfe: network evaluations.
        solver: "ddim", "ipndm", "deis", "dpm_solver_pp" (multistep), "dpm_solver" (singlestep,
            "D-DPM-Solver-2/3") or "edm" (Heun).
        order: of the solver; None for its usual one.
        prediction: what is corrected; None for data with edm, dpm_solver_pp and ddim on an EDM
            process, else noise. Only ddim, dpm_solver and dpm_solver_pp have a choice.
        formulation: "difference" (one number a row, the method), and from its Table 1 "sep", "all"
            and "two"; the latter three for solvers with one evaluation a step.
        first_step: correct the first row with d_T - x_T; None for noise predictions only.
        scale: C, teacher sub-steps per evaluation.
        batch: start noises of the one batch that is fitted.
        ridge: penalty on lambda^2 relative to the energy of the output itself; 0 is the paper.
        alignment: "interval" puts the sub-steps inside each student interval, so that targets are
            at the student's times; "official" reproduces the public code, whose targets are not.
        grid: the student's times: a name, times, or a solver file; None for polynomial on EDM and
            uniform in time else. Set by the code with "official".
        teacher: solver of the teacher; None for ddim, and ipndm and deis themselves.
        convention: how lambdas are reported, "dimensionless" (paper) or "x" (multiplier of
            d_t - d_prev in the state, as most of the public code has it).
        chunk: samples per network call while fitting.
        keep: "best" of the fitted solver and the plain one on every standard grid; "learned" in any case
            (the presets).
    """

    nfe: int = 5
    solver: Literal["ddim", "ipndm", "deis", "dpm_solver_pp", "dpm_solver", "edm"] = "ddim"
    order: int | None = None
    prediction: Prediction | None = None
    formulation: Literal["difference", "sep", "all", "two"] = "difference"
    first_step: bool | None = None
    scale: int = 10
    batch: int = 100
    ridge: float = 0.0
    alignment: Literal["interval", "official"] = "interval"
    grid: GridSource | None = None
    teacher: str | None = None
    convention: Literal["dimensionless", "x"] = "dimensionless"
    chunk: int = 100
    keep: Keep = "best"

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, nfe=1, scale=1, batch=1, chunk=1, ridge=0)
        if self.order is not None and not 1 <= self.order <= HIGHEST[self.solver]:
            raise ValueError(
                f"order is {self.order}, expected 1..{HIGHEST[self.solver]} for {self.solver}"
            )
        if self.formulation != "difference" and self.solver in ("dpm_solver", "edm"):
            raise ValueError(
                f"formulation={self.formulation!r} is for solvers with one evaluation a step, not "
                f"{self.solver}: use 'difference'"
            )
        fixed = {"ipndm": "noise", "deis": "noise", "edm": "data"}.get(self.solver)
        if fixed is not None and self.prediction not in (None, fixed):
            raise ValueError(
                f"prediction is {self.prediction!r}, but {self.solver} is over {fixed}"
            )
        if self.alignment == "official" and self.grid is not None:
            raise ValueError("alignment='official' sets its own grid: leave grid out")
        if self.alignment == "official" and self.solver == "dpm_solver_pp":
            raise ValueError("the public code has no D-DPM-Solver++: use alignment='interval'")

    @property
    def resolved_order(self) -> int:
        return USUAL[self.solver] if self.order is None else self.order

    def resolved_prediction(self, process: Process) -> Prediction:
        """What is corrected on ``process``: never noise where alpha = 0 at the start."""
        if self.prediction is not None:
            return self.prediction
        blind = float(process.alpha(process.t_max)) == 0.0
        if blind or self.solver in ("edm", "dpm_solver_pp"):
            return "data"
        return "data" if self.solver == "ddim" and isinstance(process, EDM) else "noise"

    @property
    def resolved_teacher(self) -> str:
        if self.teacher is not None:
            return self.teacher
        return self.solver if self.solver in ("ipndm", "deis") else "ddim"

    @property
    def steps(self) -> int:
        """Intervals of the grid: one an evaluation, or one for two of them (edm)."""
        return (self.nfe + 1) // 2 if self.solver == "edm" else self.nfe

    def orders(self) -> list[int]:
        """Orders of the singlestep DPM-Solver's steps, adding up to nfe."""
        order, n = self.resolved_order, self.nfe
        if order == 1:
            return [1] * n
        if order == 2:
            return [2] * (n // 2) + [1] * (n % 2)
        if n % 3 == 0:
            return [3] * (n // 3 - 1) + [2, 1]
        return [3] * (n // 3) + [n % 3]

    def reached(self) -> list[int]:
        """Index in the grid of the time every evaluation's target belongs to."""
        if self.solver == "edm":  # both stages of a Heun step aim at its end
            return [n // 2 + 1 for n in range(self.nfe)]
        return list(range(1, self.nfe + 1))


def student_grid(settings: DodeSettings, process: Process) -> Tensor:
    """float64 ``[steps + 1]`` times of the student."""
    if settings.alignment == "official":
        return official_grid(process, settings.solver, settings.steps)
    default = "polynomial" if isinstance(process, EDM) else "time_uniform"
    source = default if settings.grid is None else settings.grid
    return start_times(process, source, settings.steps).grid


def official_grid(process: Process, solver: str, steps: int) -> Tensor:
    """The public code's grids; they end at sigma = 0 but for DPM-Solver, iPNDM and DEIS.

    EDM: ``steps`` points of the rho = 7 grid, then 0. Discrete models: indices floor(L k / steps)
    for ddim, rounded linspace(L - 1, 0) for ipndm and deis, continuous t from 1 to 1/L for
    dpm_solver.
    """
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    if isinstance(process, EDM):
        if steps == 1:
            return torch.tensor([process.t_max, 0.0], dtype=torch.float64, device="cpu")
        return torch.cat([grids.polynomial(process, steps - 1), zero])
    if not isinstance(process, VPDiscrete):
        raise ValueError(
            f"alignment='official' exists for EDM and VPDiscrete, not {process!r}: "
            "use alignment='interval'"
        )
    levels = process.levels
    if solver == "ddim":
        if steps > levels:
            raise ValueError(f"{steps} steps on a model of {levels} levels")
        places = torch.tensor(
            [levels * k // steps for k in range(steps)], dtype=torch.float64, device="cpu"
        )
        return torch.cat([(places.flip(0) + 1) / levels, zero])
    if solver in ("ipndm", "deis"):
        places = torch.linspace(levels - 1, 0, steps + 1, dtype=torch.float64, device="cpu").round()
        return (places + 1) / levels
    return torch.linspace(1.0, 1 / levels, steps + 1, dtype=torch.float64, device="cpu")
