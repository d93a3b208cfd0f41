"""D-ODE: the reference, the closed form, alignment, formulations, call counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dode_cases import SOLVERS, end, problem, unit, worst

from dlms_engine import grids, solvers
from dlms_engine.engine.adjoint import walk
from dlms_engine.learners.dode.objective import base_table, fit, replay, teacher_states
from dlms_engine.learners.dode.settings import DodeSettings, student_grid
from dlms_engine.processes import EDM, VP, Process, VPDiscrete

DATA = Path(__file__).parents[1] / "data"
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "data-d_ddim-N5-C10": {"solver": "ddim", "nfe": 5},
    "data-d_edm-N5-C10": {"solver": "edm", "nfe": 9},
    "noise-d_ddim-N5-C10": {"solver": "ddim", "nfe": 5},
    "noise-d_dpmsolver2-N5-C10": {"solver": "dpm_solver", "order": 2, "nfe": 5},
    "noise-d_dpmsolver3-N5-C10": {"solver": "dpm_solver", "order": 3, "nfe": 5},
}


# -- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_official_alignment_equals_the_reference(case: str) -> None:
    """lambdas, fitted states and a second batch; the DPM-Solver code works in single precision."""
    process: Process = EDM() if case.startswith("data") else VPDiscrete(betas=BETAS)
    with np.load(DATA / "dode.npz") as file:
        ref = {
            k: torch.from_numpy(file[f"{case}/{k}"]) for k in ("lambda", "x1", "x2", "x2_lambda0")
        }
        z1, z2 = (torch.from_numpy(file[k]) for k in ("z1", "z2"))
    scale = 80.0 if case.startswith("data") else 1.0
    single = "dpmsolver" in case
    network, denoiser = problem(process)
    settings = DodeSettings(alignment="official", **CASES[case])
    fitted = fit(denoiser, settings, scale * z1)
    convention = "dimensionless" if single else "x"
    values = [getattr(c, convention)[0] for c in fitted.corrections]
    found = torch.tensor(values, dtype=torch.float64)
    plain = replay(process, settings, [[0.0]] * settings.nfe)
    bound = 1e-5 if single else 1e-10
    assert float(((found - ref["lambda"]) / ref["lambda"].abs().clamp_min(1)).abs().max()) < bound
    network.calls = 0
    assert worst(end(denoiser, fitted.table, scale * z1), ref["x1"]) < bound
    assert network.calls == settings.nfe == fitted.table.nfe
    assert worst(end(denoiser, fitted.table, scale * z2), ref["x2"]) < bound
    assert worst(end(denoiser, plain, scale * z2), ref["x2_lambda0"]) < bound
    # the fault: one lambda off by a hundredth is seen
    off = [list(c.dimensionless) for c in fitted.corrections]
    off[1][0] *= 1.01
    moved = end(denoiser, replay(process, settings, off), scale * z2)
    assert worst(moved, ref["x2"]) > 10 * bound


# -- closed form --------------------------------------------------------------------------------


def make(solver: dict[str, Any], **changes: Any) -> DodeSettings:
    nfe = changes.pop("nfe", 6)
    return DodeSettings(nfe=nfe, grid="polynomial", **solver, **changes)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s["solver"] != "dpm_solver"], ids=str)
def test_zero_lambdas_are_the_plain_solver(solver: dict[str, Any]) -> None:
    """Against the table makers, where they have the solver."""
    process = EDM()
    settings = make(solver)
    grid = student_grid(settings, process)
    plain = replay(process, settings, [[0.0]] * 6)
    _, denoiser = problem(process)
    x = 80.0 * unit(3)
    if settings.solver == "edm":
        made = solvers.heun(process, grid)
    else:
        made = base_table(process, grid, settings)
    assert worst(end(denoiser, plain, x), end(denoiser, made, x)) < 1e-11
    assert plain.nfe == made.nfe == 6


def test_dpm_solver_2_on_a_geometric_grid() -> None:
    """Uniform in lambda_, the stage is the published midpoint."""
    process, (_, denoiser) = EDM(), problem(EDM())
    grid = grids.logsnr(process, 6)
    settings = DodeSettings(nfe=6, solver="dpm_solver", order=2, grid=grid.tolist())
    plain = replay(process, settings, [[0.0]] * 6)
    made = solvers.dpm_solver_2(process, grid[::2])
    x = 80.0 * unit(3)
    assert worst(end(denoiser, plain, x), end(denoiser, made, x)) < 1e-11
    assert worst(plain.times, made.times) < 1e-12 and plain.nfe == made.nfe == 6


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("process", [EDM(), VP()], ids=["edm", "vp"])
def test_every_lambda_is_the_least_squares_solution(
    solver: dict[str, Any], process: Process
) -> None:
    """Moving one lambda either way raises the distance of its own row to the teacher."""
    _, denoiser = problem(process)
    settings = make(solver)
    grid = student_grid(settings, process)
    x = float(process.sigma(grid[0])) * unit(1, 32)
    fitted = fit(denoiser, settings, x)
    targets = teacher_states(denoiser, settings, grid, x)
    lambdas = [list(c.dimensionless) for c in fitted.corrections]

    def distance(values: list[list[float]], row: int) -> float:
        table = replay(process, settings, values)
        state = [after for _, _, after in walk(denoiser, table, x)][row]
        return float((state - targets[row]).square().mean())

    fitted_rows = 0
    for row, value in enumerate(lambdas):
        least = distance(lambdas, row)
        before, after = fitted.residuals[row]
        assert least == pytest.approx(after, rel=1e-6, abs=1e-15)
        assert after <= before * (1 + 1e-12)
        if value == [0.0]:  # nothing to correct: the first data prediction
            assert row == 0 and settings.resolved_prediction(process) == "data"
            continue
        fitted_rows += 1
        for step in (-1e-2, 1e-2):
            moved = [list(v) for v in lambdas]
            moved[row][0] += step * max(1.0, abs(value[0]))
            assert distance(moved, row) > least
    assert fitted_rows >= 5


def test_only_b_changes_but_for_the_first_row() -> None:
    _, denoiser = problem(EDM())
    for solver in SOLVERS[:5]:
        settings = make(solver)
        fitted = fit(denoiser, settings, 80.0 * unit(1)).table
        plain = base_table(EDM(), student_grid(settings, EDM()), settings)
        assert torch.equal(fitted.a[1:], plain.a[1:])
        assert torch.equal(fitted.times, plain.times)
        moved = fitted.a[0] != plain.a[0]
        assert bool(moved) == (settings.resolved_prediction(EDM()) == "noise")


def test_interval_alignment_puts_targets_at_the_students_times() -> None:
    """The official targets of the data form lie elsewhere; the teacher's own states are met."""
    process = EDM()
    _, denoiser = problem(process)
    x = 80.0 * unit(1)
    settings = DodeSettings(nfe=5, scale=100)
    grid = student_grid(settings, process)
    targets = teacher_states(denoiser, settings, grid, x)
    fine = grids.logsnr(process, 1000)
    states = [state for state, _, _ in walk(denoiser, solvers.dpm_solver_pp(process, fine), x)]
    for i, target in zip(settings.reached(), targets, strict=True):
        if i < 5:
            nearest = states[int((fine[:-1] - grid[i]).abs().argmin())]
            assert worst(target, nearest) < 0.05 * float(grid[i]) + 0.02
    code = dataclasses.replace(settings, alignment="official")
    own = student_grid(code, process)
    aligned = teacher_states(denoiser, dataclasses.replace(settings, grid=own.tolist()), own, x)
    official = teacher_states(denoiser, code, own, x)
    assert worst(official[-1], aligned[-1]) < 0.02
    assert worst(official[1], aligned[1]) > 0.5, "the fault: targets at other noise levels"


@pytest.mark.parametrize("solver", ["ddim", "edm", "ipndm", "dpm_solver_pp"])
def test_a_fresh_batch_gains(solver: str) -> None:
    """Endpoint error at 7 evaluations, exact solution, against the plain solver."""
    process = EDM()
    _, denoiser = problem(process)
    settings = DodeSettings(nfe=7, solver=solver)  # type: ignore[arg-type]
    fitted = fit(denoiser, settings, 80.0 * unit(1, 256)).table
    plain = replay(process, settings, [[0.0]] * 7)
    x = 80.0 * unit(2, 256)
    exact = end(denoiser, solvers.dpm_solver_pp(process, grids.logsnr(process, 300), order=3), x)
    before, after = (
        float((end(denoiser, t, x) - exact).square().mean().sqrt()) for t in (plain, fitted)
    )
    assert after < 0.9 * before, (before, after)
