"""Tables made for a batch of grids, and derivatives of tables in the times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from solver_cases import BETAS, impossible, short_config
from torch import Tensor

from dlms_engine.processes import EDM, VP, Process, RectifiedFlow, VPDiscrete
from dlms_engine.solvers import SOLVERS, ddim, make_solver
from dlms_engine.solvers.table import SolverTable

INNER = {
    "edm": (EDM(), [4.0], [2.5, 1.1, 0.6], [0.2]),
    "edm to 0": (EDM(), [4.0], [2.5, 1.1, 0.6], [0.0]),
    "vp": (VP(), [0.9], [0.7, 0.45, 0.2], [0.05]),
    "discrete": (VPDiscrete(betas=BETAS), [0.95], [0.7003, 0.4507, 0.2001], [0.0507]),
    "flow": (RectifiedFlow(), [1.0], [0.7, 0.45, 0.2], [0.0]),
}
every_inner = pytest.mark.parametrize(
    ("process", "first", "inner", "last"), INNER.values(), ids=INNER.keys()
)


def parts(table: SolverTable) -> tuple[Tensor, ...]:
    return table.a, table.b, table.times, table.initial_scale


def assert_batch_equals_loop(build: Any, batch: Tensor) -> None:
    together = build(batch)
    assert together.batch_shape == (len(batch),)
    for i, grid in enumerate(batch):
        for one, whole in zip(parts(build(grid)), parts(together), strict=True):
            torch.testing.assert_close(
                whole[i], one, rtol=1e-13, atol=1e-15, msg=f"grid {i} differs"
            )


@every_inner
@short_config
@pytest.mark.parametrize("afs", [False, True])
def test_batched_grids(
    process: Process, first: Any, inner: Any, last: Any, name: str, options: Any, afs: bool
) -> None:
    if impossible(process, options):
        pytest.skip("noise form cannot start at alpha = 0")
    scale = torch.tensor([1.0, 0.97, 1.05], dtype=torch.float64)[:, None]
    middle = scale * torch.tensor(inner, dtype=torch.float64)
    ends = [torch.tensor(end, dtype=torch.float64).expand(3, 1) for end in (first, last)]
    batch = torch.cat([ends[0], middle, ends[1]], dim=1)
    assert_batch_equals_loop(
        lambda grid: make_solver(name, process, grid, afs=afs, **options), batch
    )


def test_the_batch_check_can_fail() -> None:
    batch = torch.tensor([[4.0, 2.0, 1.0], [4.0, 1.5, 1.0]], dtype=torch.float64)

    def leaky(grid: Tensor) -> SolverTable:
        if grid.ndim == 2:
            grid = torch.cat(
                [grid[:, :1], grid[:, 1:2] + 1e-6 * grid[:, 1:2].mean(), grid[:, 2:]], 1
            )
        return ddim(EDM(), grid)

    with pytest.raises(AssertionError, match="grid 0 differs"):
        assert_batch_equals_loop(leaky, batch)


@every_inner
@short_config
def test_gradients_in_the_times(
    process: Process, first: Any, inner: Any, last: Any, name: str, options: Any
) -> None:
    if impossible(process, options):
        pytest.skip("noise form cannot start at alpha = 0")
    ends = [torch.tensor(end, dtype=torch.float64) for end in (first, last)]
    decoupled = "network_times" in SOLVERS[name].options

    def coefficients(times: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
        extra = {"network_times": torch.cat([ends[0], asked, ends[1]])} if decoupled else {}
        grid = torch.cat([ends[0], times, ends[1]])
        table = make_solver(name, process, grid, store="data", **extra, **options)
        return table.a, table.b

    times = torch.tensor(inner, dtype=torch.float64, requires_grad=True)
    asked = (times.detach() * 1.01).requires_grad_()
    assert torch.autograd.gradcheck(coefficients, (times, asked), atol=1e-6, rtol=1e-5)


def test_gradients_with_afs_and_batches() -> None:
    grid = torch.tensor([[4.0, 2.0, 1.0, 0.3], [5.0, 2.2, 0.9, 0.2]], dtype=torch.float64)
    for name in ("ipndm", "unipc", "heun"):
        assert torch.autograd.gradcheck(
            lambda g, name=name: parts(make_solver(name, EDM(), g, afs=True)),
            (grid.clone().requires_grad_(),),
        )
