"""Convergence orders on Gaussian data, and exactness on what each rule integrates exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from analytic import Gaussian, run_table
from torch import Tensor

from dlms_engine.processes import EDM, VP, Process, RectifiedFlow
from dlms_engine.solvers import (
    ddim,
    deis,
    dpm_solver_2,
    dpm_solver_pp,
    dpm_solver_pp_2s,
    heun,
    ipndm,
    ipndm_v,
    unipc,
)
from dlms_engine.solvers.exponential import phi
from dlms_engine.solvers.ipndm import ADAMS_BASHFORTH
from dlms_engine.solvers.quadrature import lagrange_weights
from dlms_engine.solvers.table import SolverTable

STD = torch.tensor([0.5, 1.0], dtype=torch.float64)
FLAT = {"lower_order_final": False}


def graded(process: Process, steps: int) -> Tensor:
    """Steps growing from nothing, smoothly, so that the low-order start does not show."""
    u = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 3
    ends = [float(process.lambda_(t)) for t in (process.t_max, process.t_min)]
    grid = process.inverse_lambda(ends[0] + (ends[1] - ends[0]) * u)
    grid[0], grid[-1] = process.t_max, process.t_min
    return grid


def slope(make: Callable[[Process, Tensor], SolverTable], process: Process) -> float:
    """log2 of the error's fall from 64 to 128 steps, after checking the number of calls."""
    errors = []
    for steps in (64, 128):
        grid, denoiser = graded(process, steps), Gaussian(process, STD, mean=0.3)
        x = torch.full((1, 2), float(process.sigma(grid[0])) + 0.4, dtype=torch.float64)
        table = make(process, grid)
        error = run_table(table, denoiser, x) - denoiser.exact(x, grid[0], grid[-1])
        errors.append(error.abs().max().item())
        assert denoiser.calls == table.nfe
    return math.log2(errors[0] / errors[1])


def assert_order(make: Any, process: Process, order: int) -> None:
    found = slope(make, process)
    assert abs(found - order) < 0.15, f"order {found:.2f}, claimed {order}"


# UniPC-p has order p + 1 (Zhao et al. 2023, Theorem 3.1); the published 3M rule has order 2.
CLAIMS: list[tuple[str, int, Any, dict[str, Any]]] = [
    ("ddim", 1, ddim, {}),
    ("heun", 2, heun, {}),
    ("dpm_solver_2", 2, dpm_solver_2, {}),
    ("dpm_solver_2 r=0.7", 2, dpm_solver_2, {"r": 0.7}),
    ("2S", 2, dpm_solver_pp_2s, {}),
    ("ipndm2", 2, ipndm, {"order": 2}),
    ("ipndm_v2", 2, ipndm_v, {"order": 2}),
    ("ipndm_v3", 3, ipndm_v, {"order": 3}),
    ("ipndm_v4", 4, ipndm_v, {"order": 4}),
    ("deis2", 2, deis, {"order": 2}),
    ("deis3", 3, deis, {"order": 3}),
    ("deis4", 4, deis, {"order": 4}),
    ("2M", 2, dpm_solver_pp, {"order": 2, **FLAT}),
    ("2M noise", 2, dpm_solver_pp, {"order": 2, "prediction": "noise", **FLAT}),
    (
        "3M exact noise",
        3,
        dpm_solver_pp,
        {"order": 3, "exact": True, "prediction": "noise", **FLAT},
    ),
    ("3M noise", 2, dpm_solver_pp, {"order": 3, "prediction": "noise", **FLAT}),
    ("unipc1", 2, unipc, {"order": 1, **FLAT}),
    ("unipc2", 3, unipc, {"order": 2, **FLAT}),
    ("unipc2 noise", 3, unipc, {"order": 2, "prediction": "noise", **FLAT}),
    ("unipc3", 4, unipc, {"order": 3, **FLAT}),
    ("unipc3 bh1", 4, unipc, {"order": 3, "variant": "bh1", **FLAT}),
]
BOUNDED = EDM(t_min=0.5, t_max=4.0)


@pytest.mark.parametrize(
    ("order", "make", "options"), [c[1:] for c in CLAIMS], ids=[c[0] for c in CLAIMS]
)
def test_order(order: int, make: Any, options: dict[str, Any]) -> None:
    assert_order(lambda process, grid: make(process, grid, **options), BOUNDED, order)


@pytest.mark.parametrize(
    ("process", "make", "order"),
    [
        (VP(t_min=0.25, t_max=0.7), heun, 2),
        (VP(t_min=0.25, t_max=0.7), lambda p, g: unipc(p, g, order=2, **FLAT), 3),
        (VP(t_min=0.25, t_max=0.7), lambda p, g: ipndm_v(p, g, order=2), 2),
        (RectifiedFlow(0.3, 0.8), ddim, 1),
        (RectifiedFlow(0.3, 0.8), heun, 2),
        (RectifiedFlow(0.3, 0.8), lambda p, g: dpm_solver_pp(p, g, exact=True, order=3, **FLAT), 3),
        (RectifiedFlow(0.3, 0.8), lambda p, g: deis(p, g, order=3), 3),
    ],
)
def test_order_on_other_processes(process: Process, make: Any, order: int) -> None:
    assert_order(make, process, order)


def test_the_order_check_can_fail() -> None:
    """Weights (1.4, -0.4) instead of (1.5, -0.5) leave the method consistent but first order."""

    def wrong(process: Process, grid: Tensor) -> SolverTable:
        good, one = ipndm(process, grid, order=2), ipndm(process, grid, order=1)
        b = good.b.clone()
        b[1:] = 0.8 * good.b[1:] + 0.2 * torch.nn.functional.pad(one.b, (0, 1))[1:]
        good.b.copy_(b)
        return good

    with pytest.raises(AssertionError, match="claimed 2"):
        assert_order(wrong, BOUNDED, 2)


# -- exactness: outputs that are polynomials, whatever the state ------------------------------


def increments(table: SolverTable, outputs: Tensor) -> Tensor:
    """alpha-free change of the state over each row when m_n is ``outputs[n]`` (a == 1)."""
    total = torch.zeros(table.nfe, dtype=torch.float64)
    for n in range(table.nfe):
        for k in range(min(table.depth, n + 1)):
            total[n] += table.b[n, k] * outputs[n - k]
    return total


GRID = torch.tensor([9.0, 7.5, 5.0, 4.2, 2.0, 1.1, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_variable_step_weights_integrate_polynomials(order: int) -> None:
    table = ipndm_v(EDM(), GRID, order=order)
    for power in range(order):
        exact = (GRID[1:] ** (power + 1) - GRID[:-1] ** (power + 1)) / (power + 1)
        got = increments(table, GRID[:-1] ** power)
        torch.testing.assert_close(got[order - 1 :], exact[order - 1 :], rtol=1e-12, atol=1e-12)
    # one degree more is not integrated: the check above is not vacuous
    exact = (GRID[1:] ** (order + 1) - GRID[:-1] ** (order + 1)) / (order + 1)
    assert (increments(table, GRID[:-1] ** order) - exact)[order - 1 :].abs().max() > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_constant_weights_integrate_polynomials_on_equal_steps(order: int) -> None:
    grid = torch.linspace(9, 1, 9, dtype=torch.float64)
    table = ipndm(EDM(), grid, order=order)
    for power in range(order):
        exact = (grid[1:] ** (power + 1) - grid[:-1] ** (power + 1)) / (power + 1)
        got = increments(table, grid[:-1] ** power)
        torch.testing.assert_close(got[order - 1 :], exact[order - 1 :], rtol=1e-12, atol=1e-12)
    assert sum(ADAMS_BASHFORTH[order]) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_integrates_polynomials_in_its_time(order: int) -> None:
    """Reference: the same integral by 4,000 panels of the midpoint rule in VP time."""
    process, line = EDM(), VP.fitted(0.002, 80.0)
    grid = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.2, 0.002], dtype=torch.float64)
    table = deis(process, grid, order=order)
    tau = line.inverse_sigma(grid)
    power = order - 1
    for n in range(order - 1, 5):
        edges = torch.linspace(float(tau[n]), float(tau[n + 1]), 4001, dtype=torch.float64)
        middle = (edges[1:] + edges[:-1]) / 2
        change = line.sigma_over_alpha(edges).diff()
        # integral of tau^power d sigma by parts-free Stieltjes sum, second order in the panel
        expected = (middle**power * change).sum()
        got = increments(table, tau[:-1] ** power)[n]
        assert got.item() == pytest.approx(expected.item(), rel=2e-5)


def test_quadrature_is_exact_to_rounding() -> None:
    """Against the closed form of integral tau d sigma for the flow's clock tau = r / (1 + r)."""
    r = [torch.tensor(v, dtype=torch.float64) for v in (6.0, 9.0)]
    end = torch.tensor(0.03, dtype=torch.float64)
    w = lagrange_weights(r, end, RectifiedFlow().inverse_sigma)
    tau = [v / (1 + v) for v in r]
    got = sum(weight * value for weight, value in zip(w, tau, strict=True))
    exact = (end - torch.log1p(end)) - (r[0] - torch.log1p(r[0]))
    assert got.item() == pytest.approx(exact.item(), rel=1e-14)
    assert sum(w).item() == pytest.approx((end - r[0]).item(), rel=1e-14)


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_quadrature_does_not_depend_on_its_panels(process: Process) -> None:
    clock = (
        VP.fitted(0.002, 80.0).inverse_sigma if isinstance(process, EDM) else process.inverse_sigma
    )
    r = [torch.tensor(v, dtype=torch.float64) for v in (0.7, 3.0, 40.0, 75.0)]
    end = torch.tensor(0.002, dtype=torch.float64)
    fine = 1.5 ** torch.arange(-40.0, 20.0, dtype=torch.float64)
    for one, other in zip(
        lagrange_weights(r, end, clock), lagrange_weights(r, end, clock, fine), strict=True
    ):
        assert one.item() == pytest.approx(other.item(), rel=1e-13)


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda p, g: dpm_solver_pp(p, g, order=1), 1),
        (lambda p, g: dpm_solver_pp(p, g, order=2, exact=True, **FLAT), 2),
        (lambda p, g: dpm_solver_pp(p, g, order=3, exact=True, **FLAT), 3),
    ],
)
def test_exponential_integrators_integrate_polynomials_in_lambda(make: Any, order: int) -> None:
    """x_t = (s_t/s_s) x_s + s_t integral e^lambda m dlambda, with m = lambda^(order - 1)."""
    process = VP()
    grid = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.3, 0.1], dtype=torch.float64)
    table, lam, sigma = make(process, grid), process.lambda_(grid), process.sigma(grid)
    power = order - 1
    antiderivative = [lam.exp(), lam.exp() * (lam - 1), lam.exp() * (lam**2 - 2 * lam + 2)][power]
    exact = sigma[1:] * antiderivative.diff()
    got = increments(table, lam[:-1] ** power)
    torch.testing.assert_close(got[power:], exact[power:], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(table.a, sigma[1:] / sigma[:-1], rtol=1e-14, atol=0)


def test_published_third_order_rule_is_not_exact() -> None:
    """The published D2 term lacks a factor 2 (see ``dpm_solver_pp``'s ``exact``)."""
    grid = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.3, 0.1], dtype=torch.float64)
    published, exact = (
        dpm_solver_pp(VP(), grid, order=3, exact=flag, **FLAT).b[3] for flag in (False, True)
    )
    assert (published - exact).abs().max() > 1e-3
    assert published.sum().item() == pytest.approx(exact.sum().item(), rel=1e-12)


def test_phi_functions() -> None:
    u = torch.tensor([-30.0, -1.0001, -0.9999, -1e-3, -1e-9, 1e-9, 0.5, 1.0001, 12.0]).double()
    for order in (1, 2, 3, 4):
        x, w = torch.linspace(0, 1, 20001, dtype=torch.float64), 1 / 20000
        integrand = torch.exp((1 - x) * u[:, None]) * x ** (order - 1) / math.factorial(order - 1)
        simpson = torch.ones(20001, dtype=torch.float64)
        simpson[1:-1:2], simpson[2:-1:2] = 4, 2
        expected = (integrand * simpson).sum(-1) * w / 3
        torch.testing.assert_close(phi(order, u), expected, rtol=1e-11, atol=0)
    u.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: phi(3, v), (u[:-1],))
