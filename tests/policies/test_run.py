"""The plainest loop keeps what rows may read, and a table's rows are those of its samples."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from dlms_engine import Denoiser, Sampler, solvers
from dlms_engine.policies.run import run_predictions
from dlms_engine.processes import EDM, grids
from dlms_engine.solvers.table import SolverTable

PROCESS = EDM()


def network(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def kept(table: SolverTable) -> int:
    """Most predictions alive after a row of a run."""
    made: list[Any] = []
    denoiser = Denoiser(network, PROCESS)
    predict = denoiser.predict

    def watched(*args: Any, **options: Any) -> Tensor:
        out = predict(*args, **options)
        made.append(weakref.ref(out))
        return out

    denoiser.predict = watched  # type: ignore[method-assign]
    most = 0

    def after(n: int, x: Tensor) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in made))

    run_predictions(denoiser, table, torch.randn(2, 3), {}, after)
    return most


def test_a_long_run_keeps_the_outputs_that_rows_read() -> None:
    """It kept all: with thresholding a run of 1,000 steps held 1,000 outputs."""
    table = solvers.dpm_solver_pp(PROCESS, grids.polynomial(PROCESS, 30), order=2)
    assert kept(table) <= table.depth + 1  # and the loop's own name for the last one read
    b = torch.nn.functional.pad(table.b, (0, 28))
    assert kept(dataclasses.replace(table, b=b)) > 20  # planted: rows that may read all


@pytest.mark.parametrize("options", [{}, {"dynamic_thresholding": 0.99}], ids=["plain", "clipped"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_rows_of_two_samples_do_not_make_two_of_one(options: dict[str, Any], backend: str) -> None:
    """Broadcasting did, in the plain loops."""
    both = torch.stack([grids.polynomial(PROCESS, 3, rho) for rho in (7.0, 3.0)])
    table = solvers.ddim(PROCESS, both)
    sampler = Sampler(Denoiser(network, PROCESS, **options), table, backend=backend)
    for batch in (1, 3):
        with pytest.raises(ValueError, match=rf"each of \[2\] samples, and the batch is {batch}"):
            sampler(torch.randn(batch, 4))
    x = 80 * torch.randn(2, 4)
    assert not torch.equal(sampler(x), sampler(x.flip(0)).flip(0))  # planted: rows differ
