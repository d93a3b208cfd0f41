"""Solvers by name, and the list of handcrafted tables for a budget."""

from __future__ import annotations

import pytest

from dlms_engine.processes import EDM, Process, RectifiedFlow
from dlms_engine.solvers import SOLVERS, handcrafted
from dlms_engine.solvers.registry import standard_grids


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=lambda p: p.name)
@pytest.mark.parametrize("nfe", [1, 4])
def test_handcrafted_tables_cost_exactly_the_budget(process: Process, nfe: int) -> None:
    found = handcrafted(process, nfe)
    labels = [label for label, _ in found]
    assert len(set(labels)) == len(labels) > 3
    assert {table.nfe for _, table in found} == {nfe}
    for label, table in found:
        assert ("/afs-" in label) == bool(table.options["afs"])
    if nfe == 4:
        assert {table.name for _, table in found} >= set(SOLVERS) - {"heun", "dpm_solver_pp_2s"}
        for grid in standard_grids(process):
            assert {f"ipndm3/{grid}", f"ipndm3/{grid}/afs-dockhorn"} <= set(labels)


def test_two_stage_solvers_appear_where_they_can() -> None:
    odd = [label for label, _ in handcrafted(EDM(), 3)]
    assert not any(label.startswith("heun") and "afs" not in label for label in odd)
    assert any(label.startswith("heun") and "afs" in label for label in odd)
    flow = [label for label, _ in handcrafted(RectifiedFlow(), 5)]
    assert "heun/uniform" in flow  # the step to t = 0 costs one evaluation


def test_equal_tables_are_listed_once() -> None:
    """With one step every one-evaluation solver is Euler: one data and one noise table a grid."""
    labels = [label for label, _ in handcrafted(EDM(), 1, afs=(False,))]
    assert labels == [
        f"{name}/{grid}" for grid in standard_grids(EDM()) for name in ("ddim", "ipndm2")
    ]


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="nfe is 0"):
        handcrafted(EDM(), 0)
