"""Every solver on every process: 1, 2, 3 steps, AFS, both stores, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from analytic import Gaussian, GaussianMixture, run_table
from solver_cases import (
    PROCESSES,
    SHORT,
    every_config,
    every_process,
    impossible,
    make,
    short_config,
    start_state,
)
from torch import Tensor

from dlms_engine import grids
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow
from dlms_engine.solvers import SOLVERS, ddim, dpm_solver_pp, heun, ipndm, make_solver, unipc
from dlms_engine.solvers.table import SolverTable


@every_process
@short_config
def test_few_steps(process: Process, name: str, options: dict[str, Any]) -> None:
    """1, 2 and 3 steps stay finite and bounded, with exactly the promised calls."""
    z = torch.tensor([[-1.5, -0.2, 0.4, 1.8]], dtype=torch.float64)
    for steps in (1, 2, 3):
        if impossible(process, options):
            with pytest.raises(ValueError, match="alpha is 0"):
                make(name, process, steps, **options)
            continue
        plain = make(name, process, steps, **options).nfe
        for afs in (False, "dockhorn", "zero"):
            if afs and plain == 1:
                with pytest.raises(ValueError, match="one step more"):
                    make(name, process, steps, afs=afs, **options)
                continue
            table = make(name, process, steps, afs=afs, **options)
            denoiser = Gaussian(process, 0.5, mean=0.3)
            x = start_state(process, table.grid, z)
            got = run_table(table, denoiser, x)
            assert got.isfinite().all()
            assert got.abs().max() < 1.5 * (x / start_alpha(process)).abs().max(), table
            assert denoiser.calls == table.nfe == plain - (afs is not False)


@pytest.mark.parametrize("key", ["edm", "vp", "discrete", "cosine", "flow"])
@every_config
def test_twenty_steps_arrive(key: str, name: str, options: dict[str, Any]) -> None:
    process = PROCESSES[key]
    if impossible(process, options):
        pytest.skip("noise form cannot start at alpha = 0")
    z = torch.tensor([[-1.5, -0.2, 0.4, 1.8]], dtype=torch.float64)
    grid = (grids.time_uniform if key == "flow" else grids.polynomial)(process, 20)
    denoiser, x = Gaussian(process, 0.5, mean=0.3), start_state(process, grid, z)
    got = run_table(make_solver(name, process, grid, **options), denoiser, x)
    error = (got - denoiser.exact(x, grid[0], grid[-1])).abs().max().item()
    assert error < (0.15 if name == "ddim" else 0.08), f"off by {error:.3f}"


def start_alpha(process: Process) -> float:
    """alpha at the start, 1/3 from pure noise: x / alpha is the scale steps are taken on."""
    return float(process.alpha(process.t_max)) or 1 / 3


def expected_nfe(name: str, process: Process, steps: int) -> int:
    start = float(process.alpha(process.t_max)) == 0
    end = float(process.sigma(process.t_min)) == 0
    flow = isinstance(process, RectifiedFlow)
    if name in ("heun", "dpm_solver_2"):
        return 2 * steps - (end if name == "heun" or not flow else 0)
    if name == "dpm_solver_pp_2s":
        return 2 * steps - (1 if steps == 1 and (start or end) else start + end)
    return steps


@every_process
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_nfe(process: Process, name: str, steps: int) -> None:
    assert make(name, process, steps).nfe == expected_nfe(name, process, steps)


@pytest.mark.parametrize("key", ["edm", "edm to 0", "vp", "flow"])
@every_config
def test_exact_for_constant_data(key: str, name: str, options: dict[str, Any]) -> None:
    """With D = c everywhere the flow is a straight line in (c, noise): every solver is exact."""
    process = PROCESSES[key]
    if impossible(process, options):
        pytest.skip("noise form cannot start at alpha = 0")
    c = torch.tensor([0.7, -1.2], dtype=torch.float64)
    for steps in (2, 5):
        assert_exact_for_constant(make(name, process, steps, **options), c)


def assert_exact_for_constant(table: SolverTable, c: Tensor) -> None:
    process, (first, last) = table.process, (table.grid[0], table.grid[-1])
    noise = torch.tensor([[1.1, 0.3]], dtype=torch.float64)
    x = process.alpha(first) * c + process.sigma(first) * noise
    got = run_table(table, lambda x, t: c.expand_as(x), x)
    exact = process.alpha(last) * c + process.sigma(last) * noise
    error = (got - exact).abs().max().item()
    assert error < 2e-11, f"{table}: constant data missed by {error:.1e}"


def test_the_constant_check_can_fail() -> None:
    table = make("unipc", EDM(), 4)
    b = table.b.clone()
    b[2, 1] += 1e-7
    with pytest.raises(AssertionError, match="constant data missed"):
        assert_exact_for_constant(dataclasses.replace(table, b=b), torch.ones(2).double())


@short_config
@pytest.mark.parametrize("afs", [False, "dockhorn", "zero"])
def test_both_stores_give_the_same_states(name: str, options: dict[str, Any], afs: Any) -> None:
    z = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for process in (EDM(), VP(), RectifiedFlow(0.02, 0.98)):
        tables = [make(name, process, 5, store=s, afs=afs, **options) for s in ("data", "noise")]
        assert [table.prediction for table in tables] == ["data", "noise"]
        x = process.sigma(tables[0].grid[0]) * z
        one, other = (
            run_table(table, GaussianMixture(process), x, states=True) for table in tables
        )
        scale = x.abs().max()
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-11)


@every_config
def test_depth_is_as_short_as_the_method_allows(name: str, options: dict[str, Any]) -> None:
    order = options.get("order", 1)
    depth = {"unipc": order + 1, "heun": 2, "dpm_solver_2": 2, "dpm_solver_pp_2s": 2}
    assert make(name, EDM(), 8, **options).depth == depth.get(name, order)


# -- particular behaviour --------------------------------------------------------------------


def test_network_is_asked_where_it_should_be() -> None:
    grid = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    assert heun(EDM(), grid).times.tolist() == [4, 1, 1, 0.25]
    middle = make_solver("dpm_solver_2", EDM(), grid).times.tolist()
    assert middle == pytest.approx([4, 2, 1, 0.5], rel=1e-15)
    assert unipc(EDM(), grid).times.tolist() == [4, 1]
    assert heun(EDM(), torch.tensor([4.0, 1.0, 0.0]).double()).times.tolist() == [4, 1, 1]
    flow = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert make_solver("dpm_solver_2", RectifiedFlow(), flow).times.tolist() == [1, 0.75, 0.5, 0.25]


def test_ddim_row_in_closed_form() -> None:
    table = ddim(EDM(), torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert table.a.tolist() == [0.25] and table.b.tolist() == [[pytest.approx(0.75, abs=1e-15)]]
    flow = ddim(RectifiedFlow(), torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))
    assert flow.a.tolist() == [0.25, 0.0] and flow.b.flatten().tolist() == [0.75, 1.0]


def test_afs_scales() -> None:
    """dockhorn: x1 = x0 (1 + (t1 - t0) / sqrt(1 + t0^2)); zero: x1 = x0 t1 / t0."""
    grid = torch.tensor([80.0, 10.0, 1.0], dtype=torch.float64)
    for make_table in (ddim, ipndm, unipc, dpm_solver_pp):
        scale = make_table(EDM(), grid, afs=True).initial_scale.item()
        assert scale == pytest.approx(1 - 70 / 6401**0.5, rel=1e-13)
        assert make_table(EDM(), grid, afs="zero").initial_scale.item() == pytest.approx(0.125)


def test_afs_keeps_the_states_of_the_analytic_denoiser() -> None:
    """AFS is the plain solver run on a denoiser that answers x0 (1 - t / sqrt(1 + t^2)) first."""
    process, grid = EDM(), grids.polynomial(EDM(), 5)
    x = 80 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixture = GaussianMixture(process)

    def first_analytic(x: Tensor, t: Tensor) -> Tensor:
        return x * (1 - t / torch.sqrt(1 + t**2)) if t == grid[0] else mixture(x, t)

    for name, options in SHORT.values():
        plain = run_table(make_solver(name, process, grid, **options), first_analytic, x)
        table = make_solver(name, process, grid, afs="dockhorn", **options)
        torch.testing.assert_close(run_table(table, mixture, x), plain, rtol=1e-9, atol=1e-10)


def test_noise_form_falls_back_to_data_from_pure_noise() -> None:
    grid = grids.time_uniform(RectifiedFlow(), 4)
    assert ipndm(RectifiedFlow(), grid).prediction == "data"
    assert ipndm(RectifiedFlow(), grid, afs=True).prediction == "noise"
    with pytest.raises(ValueError, match="alpha is 0"):
        ipndm(RectifiedFlow(), grid, store="noise")


@pytest.mark.parametrize("name", [n for n, s in SOLVERS.items() if "network_times" in s.options])
def test_a_grid_from_pure_noise_keeps_data_whatever_time_the_network_is_told(name: str) -> None:
    """With the first network time a little below 1 noise was stored, by weights that cancel."""
    process = RectifiedFlow()
    grid = grids.time_uniform(process, 4)
    told = grid.clone()
    told[0] -= 1e-3
    table = make_solver(name, process, grid, network_times=told)
    assert table.prediction == make_solver(name, process, grid).prediction
    assert float(table.b.abs().max()) < 10
    as_it_was = make_solver(name, process, grid, network_times=told, store="noise")  # planted
    assert float(as_it_was.b.abs().max()) > 100


def test_order_at_the_ends() -> None:
    """With lower_order_final the last row reads one output; to sigma = 0 it always does."""
    last = dpm_solver_pp(EDM(), grids.polynomial(EDM(), 6), order=3).b[-1]
    assert last[1:].tolist() == [0, 0]
    flat = dpm_solver_pp(EDM(), grids.polynomial(EDM(), 6), order=3, lower_order_final=False).b[-1]
    assert (flat != 0).all()
    zero_end = EDM(t_min=0.0)
    end = dpm_solver_pp(zero_end, grids.polynomial(zero_end, 6), order=3, lower_order_final=False)
    assert end.b[-1].tolist() == [1, 0, 0] and end.a[-1].item() == 0


def test_unipc_with_fewer_steps_than_its_order_spends_no_more_evaluations() -> None:
    for order in (1, 2, 3):
        for steps in (1, 2, 3):
            for low in (True, False):
                grid = grids.logsnr(EDM(), steps)
                table = unipc(EDM(), grid, order=order, lower_order_final=low)
                assert table.nfe == steps


GRID = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ipndm(EDM(), GRID, order=5), "order is 5"),
        (lambda: ipndm(EDM(), GRID, order=0), "order is 0"),
        (lambda: unipc(EDM(), GRID, order=4), "order is 4"),
        (lambda: unipc(EDM(), GRID, variant="bh3"), "'bh3'"),
        (lambda: dpm_solver_pp(EDM(), GRID, prediction="flow"), "'flow'"),
        (lambda: make_solver("deis", EDM(), GRID, variant="x"), "'x'"),
        (lambda: make_solver("dpm_solver_2", EDM(), GRID, r=0.0), "r is 0.0"),
        (lambda: make_solver("dpm_solver_pp_2s", EDM(), GRID, r=1.0), "r is 1.0"),
        (lambda: make_solver("euler", EDM(), GRID), "'euler'"),
        (lambda: make_solver("heun", EDM(), GRID, order=2), "no option"),
        (lambda: ddim(EDM(), GRID, afs="yes"), "afs is 'yes'"),
        (lambda: ddim(EDM(), GRID, afs=1), "afs is 1"),
        (lambda: ddim(EDM(), GRID.flip(0)), "strictly decreasing"),
        (lambda: ddim(EDM(), GRID[:1]), "2 times"),
        (lambda: ddim(EDM(), torch.tensor([3, 2, 1])), "floating-point"),
        (lambda: ddim(EDM(), GRID, network_times=GRID[:2]), "network_times"),
        (lambda: ddim(EDM(), GRID, store="velocity"), "'velocity'"),
        (
            lambda: ddim(EDM(), torch.tensor([[4.0, 2.0, 0.0], [4.0, 2.0, 1.0]]).double()),
            "part of the batch",
        ),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
