"""What a designer is not made of, from Python and from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlms_engine import Denoiser, Sampler, load_solver, save
from dlms_engine.policies.designer import Designer, DesignerSettings
from dlms_engine.policies.dlms import DesignerPolicy
from dlms_engine.processes import EDM, RectifiedFlow, grids
from dlms_engine.solvers.file import SolverFileError, read_solver
from dlms_engine.solvers.format import serialize

SETTINGS = DesignerSettings(steps=4, order=2, features=0)
FLOW = RectifiedFlow()


def policy(settings: DesignerSettings = SETTINGS, grid: torch.Tensor | None = None) -> Any:
    grid = grids.polynomial(EDM(), 4) if grid is None else grid
    process = FLOW if float(grid[0]) <= 1 else EDM()
    weights = torch.zeros(4, 2, dtype=torch.float64)
    weights[:, 0] = 1
    return DesignerPolicy(Designer(settings, process, grid, weights))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction": "velocity"}, "prediction is 'velocity', expected one of"),
        ({"coordinate": "root"}, "coordinate is 'root', expected one of"),
        ({"order": 0}, "order is 0, expected an integer of at least 1"),
        ({"features": -1}, "features is -1"),
    ],
)
def test_settings_that_are_none_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Any other prediction was noise, any other coordinate linear; a file's, too."""
    with pytest.raises(ValueError, match=said):
        replace(SETTINGS, **change)
    path = tmp_path / "solver.safetensors"
    save(path, policy())
    assert load_solver(path).nfe == 3  # planted: as it was saved it loads
    record = read_solver(path)
    record.settings["designer"].update(change)
    path.write_bytes(serialize(record))
    with pytest.raises(SolverFileError, match=said):
        load_solver(path)


def test_times_that_do_not_fall_are_refused() -> None:
    grid = grids.polynomial(EDM(), 4)
    for wrong in (grid.flip(0), grid[[0, 1, 1, 3, 4]]):
        with pytest.raises(ValueError, match="expected falling times"):
            policy(grid=wrong)
    assert policy(grid=grid).nfe == 3


def test_the_logarithm_of_time_does_not_end_at_zero() -> None:
    """On a flow to t = 0 every sample was NaN."""
    grid = torch.linspace(1, 0, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="use coordinate='linear'"):
        policy(grid=grid)
    made = policy(replace(SETTINGS, coordinate="linear"), grid)
    sampler = Sampler(Denoiser(lambda x, t: 0.1 * x, FLOW), made)
    assert bool(sampler(torch.randn(2, 3)).isfinite().all())


def test_training_under_autocast_makes_the_rows_of_sampling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The designer's layers were bfloat16's then: other times than those it is used with."""
    designer = policy(replace(SETTINGS, features=5)).designer
    torch.nn.init.normal_(designer.head.weight)
    features, t = torch.randn(2, 5), torch.full((2,), 20.0, dtype=torch.float64)
    wanted = designer(features, t, 2)

    def trained() -> bool:
        with torch.autocast("cpu", torch.bfloat16):
            found = designer(features, t, 2)
        return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    assert trained()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # planted
    assert not trained()
