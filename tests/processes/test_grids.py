"""Grids: published values, exact ends, every number of steps."""

from __future__ import annotations

import math

import pytest
import torch

from dlms_engine import grids
from dlms_engine.processes import EDM, VP, Cosine, Process, RectifiedFlow, VPDiscrete

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SD = VPDiscrete(betas=BETAS)
ALL = [EDM(), EDM(t_min=0.0), VP(), SD, Cosine(), RectifiedFlow()]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (lambda p: grids.polynomial(p, 5), (80, 24.408342, 5.838948, 0.965417, 0.085087, 0.002)),
        (lambda p: grids.logsnr(p, 5), (80, 9.608995, 1.154160, 0.138629, 0.016651, 0.002)),
        (
            lambda p: grids.time_uniform(p, 5),
            (80, 16.506206, 4.746338, 1.754111, 0.650216, 0.002),
        ),
        (
            lambda p: grids.time_uniform(p, 5, 2),
            (80, 6.292340, 1.559965, 0.556002, 0.150343, 0.002),
        ),
    ],
)
def test_published_values_on_edm(grid, expected) -> None:
    assert grid(EDM()).tolist() == pytest.approx(list(expected), rel=1e-9, abs=6e-7)


def test_discrete_grid_of_stable_diffusion() -> None:
    sigma = SD.sigma_over_alpha(grids.discrete(SD, 5))
    expected = [14.61464, 5.09241, 2.27973, 1.16287, 0.57119, 0.02917]
    assert sigma.tolist() == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_power_holds_for_a_segment_below_the_top() -> None:
    """The first end takes the 1/rho power too: rho must not move the ends of a sub-range."""
    part = grids.discrete(SD, 4, rho=2.0, t_max=0.5, t_min=0.1)
    root = part.sqrt()
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", ALL, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("name", ["polynomial", "logsnr", "time_uniform", "quadratic"])
def test_every_grid(process: Process, steps: int, name: str) -> None:
    if name == "logsnr" and not math.isfinite(float(process.lambda_(process.t_min))):
        with pytest.raises(ValueError, match="finite"):
            grids.logsnr(process, steps)
        return
    make = {**grids.GRIDS, "quadratic": lambda p, n: grids.time_uniform(p, n, 2.0)}[name]
    grid = make(process, steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid[0].item() == process.t_max and grid[-1].item() == process.t_min
    assert (grid.diff() < 0).all()


def test_ends_can_be_given() -> None:
    for make in (grids.polynomial, grids.logsnr, grids.time_uniform):
        grid = make(EDM(), 3, t_max=14.6, t_min=0.03)
        assert (grid[0].item(), grid[-1].item()) == (14.6, 0.03)
        inside = grids.time_uniform(RectifiedFlow(), 3, t_max=0.9, t_min=0.1)
        assert (inside[0].item(), inside[-1].item()) == (0.9, 0.1)


def test_logsnr_and_polynomial_are_uniform_in_what_they_say() -> None:
    step = VP().lambda_(grids.logsnr(VP(), 7)).diff()
    torch.testing.assert_close(step, step.mean().expand(7), rtol=1e-9, atol=0)
    step = (VP().sigma_over_alpha(grids.polynomial(VP(), 7)) ** (1 / 7)).diff()
    torch.testing.assert_close(step, step.mean().expand(7), rtol=1e-9, atol=0)


def test_shifted_flow_times() -> None:
    grid = grids.shifted(RectifiedFlow(), 4, shift=3.0)
    u = torch.linspace(1, 0, 5, dtype=torch.float64)
    torch.testing.assert_close(grid, 3 * u / (1 + 2 * u), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(grids.shifted(RectifiedFlow(), 4, 1.0), u, rtol=1e-14, atol=1e-15)


def test_explicit_times() -> None:
    gits = [80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002]
    assert grids.from_times(EDM(), gits).tolist() == gits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grids.polynomial(EDM(), 0), "steps is 0"),
        (lambda: grids.polynomial(EDM(), 2.5), "steps is 2.5"),  # type: ignore[arg-type]
        (lambda: grids.polynomial(EDM(), 3, rho=0.0), "rho is 0.0"),
        (lambda: grids.logsnr(EDM(), 3, t_max=0.001), "t_max is 0.001"),
        (lambda: grids.discrete(EDM(), 3), "expected VPDiscrete"),
        (lambda: grids.shifted(EDM(), 3), "expected a flow"),
        (lambda: grids.from_times(EDM(), [1.0]), "two times|2 times"),
        (lambda: grids.from_times(EDM(), [1.0, 1.0]), "strictly decreasing"),
        (lambda: grids.from_times(EDM(), [1.0, 2.0]), "strictly decreasing"),
        (lambda: grids.from_times(EDM(), [float("nan"), 0.1]), "finite"),
        (lambda: grids.from_times(EDM(), [1.0, -0.1]), "outside"),
        (lambda: grids.from_times(RectifiedFlow(), [1.1, 0.1]), "outside"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
