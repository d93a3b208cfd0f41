"""Settings of AMED, the grids and the teacher that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ...policies.amed_formulas import BLIND_START, AmedBase, AmedSolver
from ...processes import Process
from ...processes.grids import GRIDS, default_grid, named_grid
from ...solvers import make_solver
from ...solvers.table import SolverTable
from ..training.coerce import check_choices, check_least
from ..training.conclude import Keep, standard_tables
from ..training.coordinates import CoordinatesName
from ..training.start_times import GridSource, refine, start_times

TEACHERS = ("same", "heun", "dpm_solver_2", "ddim", "ipndm", "dpm_solver_pp")


@dataclass(frozen=True)
class AmedSettings:
    """Settings of AMED-Solver and AMED-Plugin.

    Attributes:
        nfe: network evaluations of the distilled sampler: two a step, one less with AFS.
        solver: "amed" (AMED-Solver), or the solver a plugin drives: "ddim", "dpm_solver_2",
            "ipndm", "dpm_solver_pp".
        order: of ipndm (1..4) and dpm_solver_pp (1..3); None takes the highest.
        prediction: what dpm_solver_pp interpolates, "data" or "noise" (latent models).
        lower_order_final: dpm_solver_pp's last sub-steps use lower orders.
        afs: analytical first step; None takes it for an odd nfe, where it is needed.
        grid: "time_uniform", "time_quadratic", "polynomial" or "logsnr", explicit times, a table or
            another learner's solver file; None takes the published choice: time_uniform for
            AMED-Solver, logsnr for dpm_solver_pp, polynomial for the others (uniform in time on flows).
        scale_dir: direction scales lie within 1 +- scale_dir; 0 keeps 1.
        scale_time: the network's noise level is scaled within 1 +- scale_time; 0 keeps 1.
        coordinates: "edm" works on x / alpha at levels sigma / alpha, as the paper: a network that is
            called at a scaled level has its input rescaled with it; "process" leaves the input as it
            is; None is "edm" except for flows, whose level is infinite at t = 1.
        bottleneck: the predictor reads the bottleneck; False feeds zeros, so that the choices
            are the same for all samples.
        teacher: solver of the teacher; "same" is the student's without predictor (DPM-Solver-2
            for "amed"); None takes "heun" for "amed" and "same" for a plugin.
        interpolation: M >= 0 teacher times inside each step; None takes 1 for "amed" and
            dpm_solver_2, else 2.
        restart: the next step starts from the "teacher" state or the "student"'s own; "auto" takes
            the teacher's for single-step solvers and the student's, with its history, for multistep
            ones. The paper's Algorithm 1 prints the student's for all.
        endpoint_share: fraction of the updates, the last ones, that train on the end of the whole run
            instead (not in the paper: its steps are charged one by one, and the sum of their best
            choices is not the best run); 0 is Algorithm 1.
        endpoint_steps: evaluations, at least, of the exact solution in that phase.
        validation_samples, validation_steps: fixed set and the evaluations of its exact solution.
        keep: "best" of the learned solver and the driven one on every standard grid, on samples of their
            own; "learned" in any case (the presets).
    """

    nfe: int = 5
    solver: AmedSolver = "amed"
    order: int | None = None
    prediction: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    afs: bool | None = None
    grid: GridSource | None = None
    scale_dir: float = 0.01
    scale_time: float = 0.0
    coordinates: CoordinatesName | None = None
    bottleneck: bool = True
    teacher: str | None = None
    interpolation: int | None = None
    restart: Literal["auto", "teacher", "student"] = "auto"
    endpoint_share: float = 0.85
    endpoint_steps: int = 24
    validation_samples: int = 64
    validation_steps: int = 48
    keep: Keep = "best"

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(
            self, nfe=1, interpolation=0, endpoint_steps=1, validation_samples=1, validation_steps=1,
            scale_dir=0, scale_time=0,
        )  # fmt: skip
        if (self.nfe + int(self.uses_afs)) % 2:
            raise ValueError(
                f"nfe is {self.nfe} with afs={self.uses_afs}: two evaluations a step, one less "
                "with AFS, so an odd nfe needs afs=True and an even one afs=False"
            )
        if self.teacher is not None and self.teacher not in TEACHERS:
            raise ValueError(f"teacher is {self.teacher!r}, expected one of {TEACHERS}")
        if not 0.0 <= self.endpoint_share <= 1.0:
            raise ValueError(f"endpoint_share is {self.endpoint_share}, expected 0 to 1")
        self.base()  # checks solver, order and prediction

    @property
    def uses_afs(self) -> bool:
        return self.nfe % 2 == 1 if self.afs is None else self.afs

    @property
    def steps(self) -> int:
        return (self.nfe + int(self.uses_afs)) // 2

    def base(self) -> AmedBase:
        """The driven solver."""
        return AmedBase(
            self.solver, self.order, self.prediction, self.lower_order_final, self.uses_afs
        )

    def handcrafted(self, process: Process) -> dict[str, SolverTable]:
        """The driven solver without a predictor on every standard grid, by name."""
        name = "dpm_solver_2" if self.solver == "amed" else self.solver
        afs = (False,) if self.afs is False else (False, True)
        options = self._options(name, self.base().reads)
        return standard_tables(process, name, self.nfe, options, afs)

    def coordinates_on(self, process: Process) -> CoordinatesName | None:
        """``coordinates``; a flow on DPM-Solver++ needs levels, where it has them.

        ValueError: it has none.
        """
        if self.solver == "dpm_solver_pp" and float(process.alpha(process.t_max)) == 0:
            raise ValueError(BLIND_START)
        if self.coordinates is None and self.solver == "dpm_solver_pp" and process.t_max < 1:
            return "edm"
        return self.coordinates

    @property
    def teacher_name(self) -> str:
        name = self.teacher or ("heun" if self.solver == "amed" else "same")
        if name != "same":
            return name
        return "dpm_solver_2" if self.solver == "amed" else self.solver

    @property
    def teacher_interpolation(self) -> int:
        if self.interpolation is not None:
            return self.interpolation
        return 1 if self.solver in ("amed", "dpm_solver_2") else 2

    @property
    def restarts_at_teacher(self) -> bool:
        if self.restart == "auto":
            return not self.base().multistep
        return self.restart == "teacher"

    def grids(self, process: Process) -> tuple[Tensor, Tensor]:
        """(student's ``[steps + 1]``, teacher's ``[steps * (M + 1) + 1]``) times, float64."""
        count = self.teacher_interpolation + 1
        published = {"amed": "time_uniform", "dpm_solver_pp": "logsnr"}
        usual = published.get(self.solver, default_grid(process))
        source = usual if self.grid is None else self.grid
        grid = start_times(process, source, self.steps).grid
        if not isinstance(source, str) or source not in GRIDS:
            return grid, refine(process, grid, count)
        fine = named_grid(process, source, self.steps * count)
        fine[::count] = grid  # equal but for rounding
        return grid, fine

    def teacher_table(self, process: Process, fine: Tensor) -> SolverTable:
        """The teacher: its solver on the fine grid, never with AFS."""
        name = self.teacher_name
        own = self.base().reads if name == self.solver else None
        return make_solver(name, process, fine, **self._options(name, own))

    def _options(self, name: str, order: int | None) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if name in ("ipndm", "dpm_solver_pp"):
            options["order"] = order or (4 if name == "ipndm" else 3)
        if name == "dpm_solver_pp":
            options["prediction"] = self.prediction
            options["lower_order_final"] = self.lower_order_final
        return options
