"""Solvers by name, and the list of handcrafted tables for a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlms_engine.processes import EDM, VP, Process, RectifiedFlow
from dlms_engine.solvers import SOLVERS, handcrafted, registry
from dlms_engine.solvers.registry import handcrafted_table, label_of, parse_label, standard_grids
from dlms_engine.solvers.table import SolverTable


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


@pytest.mark.parametrize("process", [VP(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_uniform_and_quadratic_times_are_searched(process: Process) -> None:
    found = standard_grids(process)
    assert {"time_uniform", "time_quadratic"} <= set(found)
    uniform, quadratic = (found[name](process, 4) for name in ("time_uniform", "time_quadratic"))
    steps = quadratic.diff().abs()
    assert bool((steps.diff() < 0).all()), "shorter towards the data"
    # planted: the other grid is no such one
    assert not bool((uniform.diff().abs().diff() < -1e-9).all())


def test_two_stage_solvers_appear_where_they_can() -> None:
    odd = [label for label, _ in handcrafted(EDM(), 3)]
    assert not any(label.startswith("heun") and "afs" not in label for label in odd)
    assert any(label.startswith("heun") and "afs" in label for label in odd)
    flow = [label for label, _ in handcrafted(RectifiedFlow(), 5)]
    assert "heun/time_uniform" in flow  # the step to t = 0 costs one evaluation


def test_equal_tables_are_listed_once() -> None:
    """With one step every one-evaluation solver is Euler: one data and one noise table a grid."""
    labels = [label for label, _ in handcrafted(EDM(), 1, afs=(False,))]
    assert labels == [
        f"{name}/{grid}" for grid in standard_grids(EDM()) for name in ("ddim", "ipndm2")
    ]


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="nfe is 0"):
        handcrafted(EDM(), 0)


def test_a_table_is_made_where_its_cost_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of steps below was tried first: a thousand steps took minutes."""
    made: list[int] = []
    inner = registry.make_solver

    def counted(name: str, process: Process, grid: Tensor, **options: Any) -> SolverTable:
        made.append(len(grid) - 1)
        return inner(name, process, grid, **options)

    monkeypatch.setattr(registry, "make_solver", counted)
    for method, nfe in (("ddim", 60), ("heun", 60), ("heun", 61), ("dpm_solver_pp_2s", 60)):
        for process in (EDM(), RectifiedFlow()):
            made.clear()
            try:
                assert handcrafted_table(process, method, nfe).nfe == nfe
            except ValueError as error:
                assert f"{method} cannot make exactly {nfe} evaluations; near it" in str(error)
            assert len(made) <= 4


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=lambda p: p.name)
@pytest.mark.parametrize("nfe", [3, 4])
def test_a_label_is_read_back_as_its_table(process: Process, nfe: int) -> None:
    for label, table in handcrafted(process, nfe):
        said = parse_label(label)
        assert said.grid is not None
        again = handcrafted_table(
            process, said.method, nfe, grid=said.grid, afs=said.afs, **said.options
        )
        assert torch.equal(again.a, table.a) and torch.equal(again.b, table.b), label
        assert label_of(again, said.grid) == label


def test_options_that_have_no_word_are_named() -> None:
    table = handcrafted_table(EDM(), "ddim", 3, prediction="noise")
    assert label_of(table, "polynomial") == "ddim-prediction=noise/polynomial"
    assert parse_label("ddim-prediction=noise/polynomial").options == {"prediction": "noise"}
    assert parse_label("ipndm4").grid is None and parse_label("dpm_solver_2").options == {}


@pytest.mark.parametrize(
    "label",
    [
        "euler/polynomial",
        "ipndm4/poly7",
        "dpm++3m/logsnr",
        "ipndm4-flat/logsnr",
        "ddim/logsnr/afs/x",
        "ddim/afs-dockhorn/afs-zero",
    ],
)
def test_what_is_no_label_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="method"):
        parse_label(label)


def rows_of(result: Any) -> Any:
    """The rows of a committed result: some are lists of them."""
    return result if isinstance(result, list) else result.get("rows", ())


def test_committed_results_use_these_labels() -> None:
    labels = {
        row["solver"]
        for path in RESULTS.glob("*.json")
        for row in rows_of(json.loads(path.read_text(encoding="utf-8")))
        if not row.get("learned", True) and "solver" in row
    }
    assert len(labels) > 100
    for label in labels:
        assert parse_label(label).grid, label
