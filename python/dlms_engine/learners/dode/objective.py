"""D-ODE solvers: one closed-form number per network evaluation, fitted on one batch.

Kim et al. 2024, "Distilling ODE Solvers of Diffusion Models into Smaller Steps" (arXiv:2309.16421).
The least squares needs no gradient of the network: two reductions per row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...engine.adjoint import walk
from ...models.denoiser import Denoiser
from ...processes import Process, VPDiscrete
from ...solvers import make_solver
from ...solvers.registry import standard_grids
from ...solvers.table import SolverTable
from ...support.parallel import World
from ..training.start_times import refine
from .fit import Correction, Fit, Replay
from .programs import heun_program, multistep_program, singlestep
from .settings import DodeSettings, official_grid, student_grid


class Fitted(NamedTuple):
    """Result of a fit.

    Attributes:
        table: the solver.
        corrections: one per evaluation.
        residuals: mean squared distance to the target before and after, one per evaluation.
    """

    table: SolverTable
    corrections: list[Correction]
    residuals: list[tuple[float, float]]


@torch.no_grad()
def fit(
    denoiser: Denoiser,
    settings: DodeSettings,
    x: Tensor,
    *,
    world: World | None = None,
    progress: bool = False,
    **conditions: Any,
) -> Fitted:
    """Fits the lambdas on start states ``x`` ``[B, ...]`` (this rank's share of the batch)."""
    process = denoiser.process
    grid = student_grid(settings, process)
    targets = teacher_states(denoiser, settings, grid, x, progress=progress, **conditions)
    recorder = Fit(
        denoiser,
        settings.resolved_prediction(process),
        x,
        targets,
        ridge=settings.ridge,
        chunk=settings.chunk,
        world=world,
        conditions=conditions,
    )
    table = _run(recorder, process, grid, settings)
    return Fitted(table, recorder.corrections, recorder.residuals)


def replay(
    process: Process, settings: DodeSettings, lambdas: Sequence[Sequence[float]]
) -> SolverTable:
    """The table for given dimensionless lambdas, one sequence per evaluation.

    ``[0.0]`` for every row gives the plain solver; rows with several directions take as many.
    """
    grid = student_grid(settings, process)
    recorder = Replay(process, settings.resolved_prediction(process), lambdas)
    return _run(recorder, process, grid, settings)


def _run(recorder: Replay, process: Process, grid: Tensor, settings: DodeSettings) -> SolverTable:
    prediction = settings.resolved_prediction(process)
    with_first = prediction == "noise" if settings.first_step is None else settings.first_step
    if settings.solver == "edm":
        end = heun_program(recorder, process, grid, settings.nfe)
    elif settings.solver == "dpm_solver":
        end = singlestep(recorder, process, grid, settings, with_first)
    else:
        end = multistep_program(recorder, base_table(process, grid, settings), settings, with_first)
    own = [getattr(c, settings.convention) for c in recorder.corrections]
    table = recorder.trace.table(
        end,
        grid,
        name="dode",
        options={
            "solver": settings.solver,
            "order": settings.resolved_order,
            "formulation": settings.formulation,
            "convention": settings.convention,
            "lambdas": [list(values) for values in own],
        },
    )
    return dataclasses.replace(table, times=table.times.clone())


def base_table(process: Process, grid: Tensor, settings: DodeSettings) -> SolverTable:
    """The handcrafted solver a multistep D-ODE solver corrects, storing what it corrects."""
    prediction = settings.resolved_prediction(process)
    options: dict[str, Any] = {}
    if settings.solver in ("ddim", "dpm_solver_pp"):
        options["prediction"] = prediction
    if settings.solver != "ddim":
        options["order"] = settings.resolved_order
    return make_solver(settings.solver, process, grid, store=prediction, **options)


def standard_bases(process: Process, settings: DodeSettings) -> dict[str, SolverTable]:
    """The plain solver on every standard grid where it exists, by name."""
    found = {}
    order = {} if settings.solver == "ddim" else {"order": settings.resolved_order}
    for name in standard_grids(process):
        plain = dataclasses.replace(
            settings, grid=name, alignment="interval", formulation="difference"
        )
        with contextlib.suppress(ValueError):  # a grid that starts or ends where it cannot
            table = replay(process, plain, [[0.0]] * settings.nfe)
            found[name] = dataclasses.replace(table, name=settings.solver, options=order)
    return found


def teacher_states(
    denoiser: Denoiser,
    settings: DodeSettings,
    grid: Tensor,
    x: Tensor,
    *,
    progress: bool = False,
    **conditions: Any,
) -> list[Tensor]:
    """The target of every evaluation, each like ``x``."""
    process = denoiser.process
    reached = settings.reached()
    if settings.alignment == "official":
        name = "ddim" if settings.resolved_teacher == "ddim" else settings.solver
        fine = settings.scale * settings.nfe
        if isinstance(process, VPDiscrete):
            fine = min(fine, process.levels)
        times = official_grid(process, name, fine)
        stride = fine // settings.nfe
        places = [stride * (n + 1) for n in range(settings.nfe)]
        places[-1] = fine
    else:
        times = refine(process, grid, settings.scale)
        places = [settings.scale * i for i in reached]
    options: dict[str, Any] = {}
    if settings.resolved_teacher == settings.solver != "ddim":
        options["order"] = settings.resolved_order
    if settings.resolved_teacher in ("ddim", "dpm_solver_pp"):
        options["prediction"] = settings.resolved_prediction(process)
    table = make_solver(settings.resolved_teacher, process, times, **options)
    kept: dict[int, list[Tensor]] = {place: [] for place in places}
    parts = torch.split(x, settings.chunk)
    bar = tqdm(
        total=table.nfe * len(parts), desc="teacher", unit="eval", leave=False, disable=not progress
    )
    for part in parts:
        for n, (_, _, state) in enumerate(walk(denoiser, table, part, **conditions)):
            if n + 1 in kept:
                kept[n + 1].append(state)
            bar.update()
    bar.close()
    return [torch.cat(kept[place]) for place in places]


def summary(fitted: Fitted) -> list[dict[str, Any]]:
    """One JSON-able entry per evaluation: lambdas and root mean squared distances to the target."""
    return [
        {
            "row": n,
            "lambda": list(correction.dimensionless),
            "lambda_x": list(correction.x),
            "rmse_before": math.sqrt(before),
            "rmse_after": math.sqrt(after),
        }
        for n, (correction, (before, after)) in enumerate(
            zip(fitted.corrections, fitted.residuals, strict=True)
        )
    ]
