"""D-DPM-Solver-2 and -3 to 1e-10, with the public code's single-precision times reproduced.

That code keeps its time grid, its knots and the model's index in single precision and fits lambda
there; ``test_dode`` compares with exact times to 1e-5. Here the rounding is part of the problem, so
that the formulas are compared and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from torch import Tensor

from dlms_engine.engine.adjoint import walk
from dlms_engine.learners.dode.fit import Fit, Replay
from dlms_engine.learners.dode.objective import _run, teacher_states
from dlms_engine.learners.dode.settings import DodeSettings
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import VPDiscrete
from dlms_engine.solvers.table import SolverTable

DATA = Path(__file__).parents[1] / "data"
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ORDERS = {2: [2, 2, 1], 3: [3, 2]}


class RoundedKnots(VPDiscrete):
    """The knots n / 1000 rounded to single precision."""

    def __init__(self) -> None:
        super().__init__(betas=BETAS)
        self._knots = torch.linspace(0, 1, 1001).double()

    def log_alpha(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        k = (torch.searchsorted(self._knots, t.detach().contiguous()) - 1).clamp(0, 999)
        weight = (t - self._knots[k]) / (self._knots[k + 1] - self._knots[k])
        return (1 - weight) * self._log_alpha[k] + weight * self._log_alpha[k + 1]


def times(orders: list[int]) -> tuple[Tensor, set[float]]:
    """The grid in single precision, and which of its times open or end a step."""
    outer = torch.linspace(1, 1e-3, 6)
    grid, i = [outer[:1]], 0
    for order in orders:
        grid.append(torch.linspace(float(outer[i]), float(outer[i + order]), order + 1)[1:])
        i += order
    ends = {float(outer[j].double()) for j in np.cumsum([0, *orders])}
    return torch.cat(grid).double(), ends


@pytest.mark.parametrize("order", [2, 3])
def test_single_precision_reference(order: int) -> None:
    with np.load(DATA / "dode.npz") as file:
        keys = ("lambda", "x1", "x2", "x2_lambda0")
        case = f"noise-d_dpmsolver{order}-N5-C10"
        ref = {k: torch.from_numpy(file[f"{case}/{k}"]) for k in keys}
        z1, z2 = (torch.from_numpy(file[k]) for k in ("z1", "z2"))
    exact, rounded = VPDiscrete(betas=BETAS), RoundedKnots()
    mixture = GaussianMixture(exact)
    grid, ends = times(ORDERS[order])

    def noise(x: Tensor, t: Tensor) -> Tensor:
        t = t.flatten()[0]
        single = float(t) in ends
        index = ((t.float() - 1 / 1000) * 1000).double() if single else (t - 1 / 1000) * 1000
        at = (index + 1) / 1000
        return (x - exact.alpha(at) * mixture(x, at)) / exact.sigma(at)

    denoiser = Denoiser(noise, rounded, "noise", time_input=lambda t: t)
    settings = DodeSettings(nfe=5, solver="dpm_solver", order=order, alignment="official")

    def table(lambdas: list[list[float]]) -> SolverTable:
        return _run(Replay(rounded, "noise", lambdas), rounded, grid, settings)

    def off(made: SolverTable, z: Tensor, wanted: Tensor) -> float:
        return float((list(walk(denoiser, made, z))[-1][2] - wanted).abs().max())

    given = [[float(v)] for v in ref["lambda"]]
    assert off(table([[0.0]] * 5), z2, ref["x2_lambda0"]) < 1e-10
    assert off(table(given), z2, ref["x2"]) < 1e-10
    moved = [list(v) for v in given]
    moved[3][0] += 1e-6
    assert off(table(moved), z2, ref["x2"]) > 1e-10, "the fault: a lambda off by 1e-6"
    # the code's own fit, and its fitted batch, are in single precision
    targets = teacher_states(Denoiser(mixture, exact, "data"), settings, grid, z1)
    recorder = Fit(denoiser, "noise", z1, targets)
    fitted = _run(recorder, rounded, grid, settings)
    found = torch.tensor([c.dimensionless[0] for c in recorder.corrections], dtype=torch.float64)
    assert float((found - ref["lambda"]).abs().max()) < 1.2e-7
    assert off(fitted, z1, ref["x1"]) < 1e-6
