"""D-ODE: formulations, conventions, ridge, ranks, few steps, files, refused settings."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from dode_cases import SOLVERS, end, problem, unit, worst
from torch import Tensor

from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.dode.objective import fit, replay
from dlms_engine.learners.dode.settings import DodeSettings
from dlms_engine.processes import EDM, VP, RectifiedFlow
from dlms_engine.support.parallel import World


def make(solver: dict[str, Any], **changes: Any) -> DodeSettings:
    nfe = changes.pop("nfe", 6)
    return DodeSettings(nfe=nfe, grid="polynomial", **solver, **changes)


def test_formulations_nest() -> None:
    """More freedom fits the first batch no worse, row by row at the first row they differ."""
    _, denoiser = problem(EDM())
    x = 80.0 * unit(1, 32)
    found = {
        name: fit(denoiser, DodeSettings(nfe=4, prediction="noise", formulation=name), x)
        for name in ("difference", "sep", "all", "two")
    }
    count = {k: [len(c.dimensionless) for c in v.corrections] for k, v in found.items()}
    assert count == {
        "difference": [1, 1, 1, 1], "sep": [1, 2, 2, 2], "all": [1, 2, 3, 4], "two": [1, 1, 2, 2],
    }  # fmt: skip
    assert found["sep"].residuals[1] == pytest.approx(found["all"].residuals[1], rel=1e-9)
    assert found["two"].residuals[1] == pytest.approx(found["difference"].residuals[1], rel=1e-12)
    assert found["two"].residuals[2][1] <= found["difference"].residuals[2][1]
    for name, fitted in found.items():
        settings = DodeSettings(nfe=4, prediction="noise", formulation=name)  # type: ignore[arg-type]
        values = [list(c.dimensionless) for c in fitted.corrections]
        again = replay(EDM(), settings, values)
        assert torch.equal(again.b, fitted.table.b) and torch.equal(again.a, fitted.table.a)


def test_both_conventions_are_the_same_solver() -> None:
    _, denoiser = problem(EDM())
    x = 80.0 * unit(1)
    kinds = {
        c: fit(denoiser, DodeSettings(nfe=4, convention=c), x).table  # type: ignore[arg-type]
        for c in ("dimensionless", "x")
    }
    left, right = (kinds[c].options["lambdas"] for c in kinds)
    assert torch.equal(kinds["x"].b, kinds["dimensionless"].b)
    grid = kinds["x"].grid
    for n in range(1, 4):
        assert right[n][0] == pytest.approx(
            left[n][0] * float(1 - grid[n + 1] / grid[n]), rel=1e-12
        )


def test_ridge_shrinks() -> None:
    """A huge ridge gives the plain solver, a small one changes little."""
    _, denoiser = problem(EDM())
    x = 80.0 * unit(1)
    sizes = []
    for ridge in (0.0, 1e-4, 1e6):
        fitted = fit(denoiser, DodeSettings(nfe=5, ridge=ridge), x)
        sizes.append(sum(abs(c.dimensionless[0]) for c in fitted.corrections))
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 1e-4


def test_ranks_agree_with_one_process() -> None:
    """Two halves of a batch with summed normal equations give the whole batch's lambdas."""
    _, denoiser = problem(EDM())
    x = 80.0 * unit(1)
    whole = fit(denoiser, DodeSettings(nfe=5), x)
    barrier, store = threading.Barrier(2), [torch.zeros(0), torch.zeros(0)]

    class Half(World):
        def sum_(self, value: Tensor) -> Tensor:
            store[self.rank] = value.clone()
            barrier.wait()
            value.copy_(store[0] + store[1])
            barrier.wait()
            return value

    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        denoiser = problem(EDM())[1]
        half = x[:3] if rank == 0 else x[3:]
        found[rank] = fit(denoiser, DodeSettings(nfe=5), half, world=Half(rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0].table.b, found[1].table.b)
    assert worst(found[0].table.b, whole.table.b) < 1e-10
    alone = fit(denoiser, DodeSettings(nfe=5), x[:3]).table
    assert worst(alone.b, whole.table.b) > 1e-3, "the fault: every rank its own lambda"


def test_calls() -> None:
    """nfe + scale * nfe network calls, in chunks too."""
    network, denoiser = problem(EDM())
    fit(denoiser, DodeSettings(nfe=4, scale=3), 80.0 * unit(1))
    assert network.calls == 4 + 12
    one = fit(denoiser, DodeSettings(nfe=4), 80.0 * unit(1)).table
    many = fit(denoiser, DodeSettings(nfe=4, chunk=3), 80.0 * unit(1)).table
    assert worst(one.b, many.b) < 1e-11


@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_few_steps(nfe: int) -> None:
    _, denoiser = problem(EDM())
    for solver in SOLVERS:
        fitted = fit(denoiser, make(solver, nfe=nfe), 80.0 * unit(1))
        assert fitted.table.nfe == nfe
        assert bool(end(denoiser, fitted.table, 80.0 * unit(2)).isfinite().all())


def test_flow_and_file(tmp_path: Path) -> None:
    """A flow from pure noise; the solver file gives the same samples."""
    from dlms_engine.policies.distilled import load_solver

    process = RectifiedFlow()
    network, denoiser = problem(process)
    path = tmp_path / "dode.safetensors"
    solver = distill(
        denoiser, "dode", nfe=4, shape=(16,), trajectories=16, output=path, progress=False
    )
    x = torch.randn(4, 16)
    network.calls = 0
    found = Sampler(denoiser, solver, backend="eager")(x)
    assert network.calls == 4
    loaded: Any = load_solver(path)
    assert torch.equal(found, Sampler(denoiser, loaded, backend="eager")(x))
    assert len(solver.history) == 4 and solver.history[0]["lambda"] == [0.0]


def test_bad_settings_are_refused() -> None:
    denoiser = problem(VP())[1]
    for bad, words in (
        ({"sclae": 3}, "unknown setting 'sclae'"),
        ({"solver": "unipc"}, "solver is 'unipc'"),
        ({"solver": "deis", "order": 5}, "order is 5, expected 1..4"),
        ({"solver": "edm", "formulation": "sep"}, "one evaluation a step"),
        ({"solver": "ipndm", "prediction": "data"}, "ipndm is over noise"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"scale": 0}, "scale is 0"),
        ({"alignment": "official"}, "exists for EDM and VPDiscrete"),
        ({"alignment": "official", "grid": "logsnr"}, "leave grid out"),
        ({"alignment": "official", "solver": "dpm_solver_pp"}, r"no D-DPM-Solver\+\+"),
        ({"convention": "sigma"}, "convention is 'sigma'"),
    ):
        with pytest.raises(ValueError, match=words):
            distill(denoiser, "dode", nfe=4, shape=(16,), trajectories=4, progress=False, **bad)
