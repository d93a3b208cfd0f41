"""Images per second against diffusers: the same model on both sides, and all figures there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlms_engine import grids, solvers
from dlms_engine.lab.bench import pipeline
from dlms_engine.policies.distilled import save_solver
from dlms_engine.processes import EDM

pytest.importorskip("diffusers")


def test_both_ways_end_at_the_same_image() -> None:
    network, shape = pipeline.make_network("embedded", "cpu", torch.float32)
    denoiser = pipeline.make_denoiser(network, pipeline.solver_of(None, 5)[1])
    assert pipeline.check_pipeline(denoiser, network, shape, "cpu") < 0.02


def test_another_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: diffusers told another standard deviation of the data."""
    network, shape = pipeline.make_network("embedded", "cpu", torch.float32)
    denoiser = pipeline.make_denoiser(network, pipeline.solver_of(None, 5)[1])
    monkeypatch.setattr(pipeline.embedded, "SIGMA_DATA", 1.0)
    with pytest.raises(RuntimeError, match="different models"):
        pipeline.check_pipeline(denoiser, network, shape, "cpu")


def test_report_of_a_solver_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = EDM()
    table = solvers.ddim(process, grids.polynomial(process, 2))
    save_solver(tmp_path / "two.safetensors", table)
    options = ["--no-compile", "--batches", "1,2", "--repeats", "2"]
    assert (
        pipeline.bench_pipeline([*options, "--solver", str(tmp_path / "two.safetensors"), "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["nfe"] == 2
    assert set(found["batches"]) == {"1", "2"}
    for batch, held in found["batches"].items():
        for way in ("dlms_engine", "diffusers"):
            each = held["ways"][way]
            assert each["p20_ms"] <= each["p50_ms"] <= each["p80_ms"]
            assert each["images_per_second"] == pytest.approx(1e3 * int(batch) / each["p50_ms"])
        rates = [held["ways"][way]["images_per_second"] for way in ("dlms_engine", "diffusers")]
        assert held["times_the_speed_of"]["diffusers"] == pytest.approx(rates[0] / rates[1])


def test_unknown_model_and_absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of embedded, cifar10-32"):
        pipeline.bench_pipeline(["--model", "magic"])
    monkeypatch.setattr(pipeline, "no_gpu", lambda program: True)
    assert pipeline.bench_pipeline(["--device", "cuda"]) == 2
