"""Solvers by name, and the list of handcrafted tables for a budget."""

from __future__ import annotations

import pytest
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow
from dlms_engine.solvers import SOLVERS, handcrafted
from dlms_engine.solvers.registry import standard_grids


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=lambda p: p.name)
@pytest.mark.parametrize("nfe", [1, 3, 4])
def test_handcrafted_tables_cost_exactly_the_budget(process: Process, nfe: int) -> None:
    found = handcrafted(process, nfe)
    labels = [label for label, _ in found]
    assert len(set(labels)) == len(labels) > 3
    assert {table.nfe for _, table in found} == {nfe}
    for label, table in found:
        table.validate()
        assert ("/afs-" in label) == bool(table.options["afs"])


def test_every_family_grid_and_afs_is_listed() -> None:
    labels = [label for label, _ in handcrafted(EDM(), 6)]
    methods = {table.name for _, table in handcrafted(EDM(), 6)}
    assert methods == set(SOLVERS)
    for grid in standard_grids(EDM()):
        assert any(label.split("/")[1] == grid for label in labels)
        assert f"ipndm4/{grid}/afs-dockhorn" in labels


def test_two_stage_solvers_appear_where_they_can() -> None:
    odd = [label for label, _ in handcrafted(EDM(), 5)]
    assert not any(label.startswith("heun") and "afs" not in label for label in odd)
    assert any(label.startswith("heun") and "afs" in label for label in odd)
    flow = [label for label, _ in handcrafted(RectifiedFlow(), 5)]
    assert "heun/uniform" in flow  # the step to t = 0 costs one evaluation


def test_equal_tables_are_listed_once() -> None:
    labels = [label for label, _ in handcrafted(EDM(), 1, afs=(False,))]
    assert labels == ["ddim/uniform"] + [f"ddim/{g}" for g in standard_grids(EDM()) if g != "uniform"] or len(
        [label for label in labels if label.endswith("/poly7")]
    ) <= 3


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="nfe is 0"):
        handcrafted(EDM(), 0)
