"""Every learner from the command line: distil, inspect, sample, evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import answer, complaint, run
from safetensors.torch import load_file

from dlms_engine import grids, solvers
from dlms_engine.cli.outcome import outcome_lines
from dlms_engine.learners import LEARNERS
from dlms_engine.policies.distilled import load_solver, save_solver
from dlms_engine.processes import EDM, VP

TINY = ("--model", "cli_model:tiny")
SMALL = {
    "auto": ("budget=6k", "effort=lean", "held_out=16"),
    "dlms": ("validation_samples=4", "batch=8"),
    "amed": ("validation_samples=4", "batch=8"),
    "ld3": ("validation=4", "rounds=1", "rounds_times=1", "loss=l2"),
    "dode": ("scale=3",),
    "gits": ("points=12", "gamma=[0.9,1.1]"),
    "free_table": ("validation_samples=4", "batch=8"),
}


@pytest.mark.parametrize("method", LEARNERS)
def test_method_runs_from_the_command_line(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{method}.safetensors"
    settings = [word for pair in SMALL[method] for word in ("--set", pair)]
    words = ("distill", *TINY, "--method", method, "--nfe", 4, "--trajectories", 16, *settings)
    made = answer(capsys, *words, "--output", path)
    assert (made["method"], made["nfe"]) == (method, 4)
    assert not path.with_suffix(".checkpoint.safetensors").exists()
    assert answer(capsys, "inspect", path)["method"] == method
    samples = tmp_path / "samples.safetensors"
    drawn = answer(capsys, "sample", *TINY, "--solver", path, "--seeds", "0-3", "--output", samples)
    assert (drawn["nfe"], drawn["images"]) == (4, 4)
    images = load_file(samples)["samples"]
    assert images.shape == (4, 3, 8, 8) and bool(images.isfinite().all())
    # planted: another seed is another image
    assert not torch.equal(images[0], images[1])
    # the same command refuses to replace what it made
    assert "exists" in complaint(capsys, *words, "--output", path)


def test_a_learned_solver_is_measured_beside_the_best_handcrafted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baseline's error is the one that ``evaluate`` gives for its label alone."""
    path = tmp_path / "auto.safetensors"
    small = [word for pair in SMALL["auto"] for word in ("--set", pair)]
    answer(capsys, "distill", *TINY, "--nfe", 3, *small, "--output", path)
    sizes = ("--samples", 8, "--exact-nfe", 12, "--accurate-nfe", 8, "--folder", tmp_path)
    found = answer(capsys, "evaluate", *TINY, "--solver", path, *sizes)
    baseline = found["baseline"]
    assert isinstance(baseline, dict)
    alone = answer(capsys, "evaluate", *TINY, "--method", baseline["solver"], "--nfe", 3, *sizes)
    assert alone["rmse"] == baseline["rmse"] and alone["baseline"] is None
    # for people: the choice beside its baseline, not the report's page of numbers
    run("inspect", path)
    shown = capsys.readouterr().out
    assert f"the best handcrafted solver, {baseline['solver']}, has" in shown
    assert "ranking" not in shown


def test_what_does_not_fit_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A solver of another process was refused after the exact solutions, a folder and minutes later."""
    path, folder = tmp_path / "other.safetensors", tmp_path / "folder"
    save_solver(path, solvers.ddim(VP(), grids.logsnr(VP(), 3)))
    refused = complaint(capsys, "evaluate", *TINY, "--solver", path, "--folder", folder)
    assert "the solver was made for name=vp" in refused
    assert not folder.exists()


def test_the_record_refuses_what_does_not_fit_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of another count was left out without a word, one of another process after the screening."""
    path, folder = tmp_path / "other.safetensors", tmp_path / "folder"
    record = ("evaluate", "--record", *TINY, "--solver", path, "--folder", folder)
    save_solver(path, solvers.ddim(VP(), grids.logsnr(VP(), 3)))
    assert "the solver was made for name=vp" in complaint(capsys, *record)
    assert "has 3 evaluations, which --nfe leaves out: 4, 5" in complaint(
        capsys, *record, "--nfe", "4-5"
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ipndm4", "--order", 2), "method 'ipndm4' says order=4, the options order=2"),
        (
            ("dpm_solver_pp3-flat", "--set", "lower_order_final=true"),
            "method 'dpm_solver_pp3-flat' says lower_order_final=False, the options "
            "lower_order_final=True",
        ),
    ],
)
def test_what_a_label_says_is_not_said_otherwise(
    words: tuple[object, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: the order beside a label with an order was dropped, a label's own option lost to --set."""
    sample = ("sample", *TINY, "--seeds", "0", "--output", tmp_path / "x.safetensors", "--method")
    assert said in complaint(capsys, *sample, *words)
    assert run(*sample, "ipndm4", "--order", 4) == 0  # the same said twice


@pytest.mark.parametrize("method", ["dode", "gits"])
def test_other_methods_are_measured_beside_their_base(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files named none: a result stood alone."""
    path = tmp_path / "solver.safetensors"
    small = ["solver=ddim", *(["points=8", "gamma=[1.0, 1.1]"] if method == "gits" else [])]
    words = [word for pair in small for word in ("--set", pair)]
    made = ("distill", *TINY, "--nfe", 3, "--method", method, "--trajectories", 4, *words)
    assert run(*made, "--output", path) == 0
    told = capsys.readouterr().out
    sizes = ("--samples", 8, "--exact-nfe", 12, "--accurate-nfe", 8, "--folder", tmp_path)
    assert run("evaluate", *TINY, "--solver", path, *sizes) == 0
    shown = capsys.readouterr().out
    base = load_solver(path).baseline
    assert base is not None and base.startswith("ddim/")
    assert method == "gits" or f"its base, {base}" in told
    assert f"its base, {base}: " in shown and "times this" in shown


def test_a_file_that_names_no_baseline_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.safetensors"
    save_solver(path, solvers.ddim(EDM(), grids.polynomial(EDM(), 3)))
    sizes = ("--samples", 8, "--exact-nfe", 12, "--accurate-nfe", 8, "--folder", tmp_path)
    assert run("evaluate", *TINY, "--solver", path, *sizes) == 0
    assert "dlms recommend --nfe 3 finds it" in capsys.readouterr().out
    assert run("evaluate", *TINY, "--method", "ddim", "--nfe", 3, *sizes) == 0
    assert "the best handcrafted solver" not in capsys.readouterr().out


def test_a_kept_base_is_not_called_times_better_than_itself() -> None:
    report = {"rmse": 0.5, "ratio": 1.0, "ratio_interval": [1.0, 1.0], "base": "ddim/logsnr"}
    (line,) = outcome_lines("auto", {}, [], {"report": {**report, "chosen": "base"}})
    assert "times below" not in line and "that of the best handcrafted solver, ddim/logsnr" in line
    learned = outcome_lines("auto", {}, [], {"report": {**report, "ratio": 2, "chosen": "table"}})
    assert "2.00 times below the best handcrafted solver, ddim/logsnr" in learned[0]
