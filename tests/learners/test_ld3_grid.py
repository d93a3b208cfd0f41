"""LD3's parameterisation against the reference, and grids shared between learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlms_engine import grids
from dlms_engine.learners.ld3.grid import (
    LearnedGrid,
    decoupled_times,
    grid_logits,
    natural_coordinate,
    softmax_grid,
)
from dlms_engine.processes import EDM, VP, RectifiedFlow

DATA = Path(__file__).parents[1] / "data"
CASES = ["lambda-init-N6", "lambda-rand-N6", "time-init-N6", "time-rand-N6"]


def reference(case: str) -> dict[str, Tensor]:
    with np.load(DATA / "ld3_parameterisation.npz") as file:
        return {
            k.split("/")[1]: torch.from_numpy(file[k])
            for k in file.files
            if k.startswith(case + "/")
        }


@pytest.mark.parametrize("case", CASES)
def test_parameterisation_equals_the_reference(case: str) -> None:
    """t, tc and their VJPs (cotangent 1, 2, .., 7), with the official bound of the offsets."""
    ref, process = reference(case), EDM()
    coordinate: Any = case.split("-")[0]
    xi = ref["xi"].clone().requires_grad_()
    xi_c = ref["xi_c"].clone().requires_grad_()
    ends = torch.tensor([80.0, 0.002], dtype=torch.float64)
    t = softmax_grid(process, xi[1:], coordinate, ends[0], ends[1])
    official = 0.5 * float(ref["xi"].diff().abs().min()) if coordinate == "lambda" else None
    tc = decoupled_times(process, t, xi_c[1:-1], coordinate, limit=official)
    weight = torch.arange(1, 8, dtype=torch.float64)
    grads = torch.autograd.grad(t @ weight, xi, retain_graph=True)
    grads += torch.autograd.grad(tc @ weight, (xi, xi_c))
    found = dict(
        zip(("t", "tc", "vjp_t_xi", "vjp_tc_xi", "vjp_tc_xic"), (t, tc, *grads), strict=True)
    )
    for name, value in found.items():
        value = value.detach()
        worst = float(((value - ref[name]).abs() / ref[name].abs().clamp_min(1)).max())
        assert worst < 1e-10, f"{name}: {worst:.2e}"
    assert t[0] == 80.0 and t[-1] == 0.002, "the ends are exact"


def test_the_clamp_is_the_only_difference() -> None:
    """With the bound from lambda_'s gaps only the entry the official code clamps differs."""
    ref, process = reference("lambda-rand-N6"), EDM()
    tc = decoupled_times(process, ref["t"], ref["xi_c"][1:-1], "lambda")
    differs = ((tc - ref["tc"]).abs() / ref["tc"] > 1e-10).nonzero().flatten().tolist()
    assert differs == [4]
    unclamped = process.inverse_lambda(process.lambda_(ref["t"][4]) + ref["xi_c"][4])
    assert abs(float(tc[4] - unclamped)) < 1e-12


@pytest.mark.parametrize("coordinate", ["lambda", "time"])
def test_any_grid_is_representable(coordinate: Any) -> None:
    process = VP()
    grid = grids.polynomial(process, 6)
    logits = grid_logits(process, grid, coordinate)
    back = softmax_grid(process, logits, coordinate, grid[0], grid[-1])
    assert float((back - grid).abs().max()) < 1e-13
    assert back[0] == grid[0] and back[-1] == grid[-1]


@pytest.mark.parametrize("seed", range(5))
def test_steps_are_positive_and_offsets_bounded(seed: int) -> None:
    """Extreme logits keep the order; offsets never reach a neighbour's window."""
    torch.manual_seed(seed)
    module = LearnedGrid(EDM(), grids.polynomial(EDM(), 7))
    with torch.no_grad():
        module.logits.copy_(4 * torch.randn(7))
        module.offsets.copy_(100 * torch.randn(6))
        times = module()
    assert bool((times.grid.diff() < 0).all())
    # two neighbours may meet half way
    assert bool((times.network.log().diff() < 1e-9).all())
    lam, asked = EDM().lambda_(times.grid), EDM().lambda_(times.network)
    assert float((asked - lam).abs().max()) <= 0.5 * float(lam.diff().min()) + 1e-12


def test_flow_uses_time() -> None:
    process = RectifiedFlow()
    module = LearnedGrid(process, grids.time_uniform(process, 4))
    assert (
        module.coordinate == "time" == natural_coordinate(process, grids.time_uniform(process, 4))
    )
    with pytest.raises(ValueError, match="coordinate='time'"):
        LearnedGrid(process, grids.time_uniform(process, 4), coordinate="lambda")
