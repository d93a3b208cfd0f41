"""The benchmark of kept memory: two processes, medians, and what is refused."""

from __future__ import annotations

import json
import platform

import pytest

from dlms_engine.lab.bench.allocator import bench_allocator, medians_of

linux = pytest.mark.skipif(platform.system() != "Linux", reason="counts page faults")


def test_rows_are_medians_over_the_rounds() -> None:
    usual = [[[3.0, 90.0]], [[9.0, 100.0]], [[4.0, 95.0]]]
    kept = [[[2.0, 0.0]], [[1.0, 1.0]], [[8.0, 2.0]]]
    (row,) = medians_of([16], {"usual": usual, "kept": kept})
    assert row == {
        "batch": 16, "usual_ms": 4.0, "usual_faults": 95.0, "kept_ms": 2.0, "kept_faults": 1.0,
        "ratio": 2.0,
    }  # fmt: skip


@linux
def test_both_sides_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "1", "--calls", "1", "--batches", "1,2", "--json"]
    assert bench_allocator(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    assert all(row["ratio"] == row["usual_ms"] / row["kept_ms"] > 0 for row in report["rows"])
    assert report["conditions"]["threads"] and report["model"] == "embedded"


@linux
def test_an_unknown_model_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_allocator(["--model", "nope"])
    assert "model is 'nope', expected 'embedded' or module:function" in capsys.readouterr().err
