"""Models with a condition for every sample, and flows, under every command that samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import answer, complaint
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlms_engine.cli.model import condition_rows, distance_features, load_model, samples_name
from dlms_engine.engine.sampler import Sampler
from dlms_engine.lab.comparison.measure import Measurer
from dlms_engine.learners.start import ExactSolution, SamplingProblem
from dlms_engine.learners.start.problem import rows_of
from dlms_engine.processes import EDM, VP, RectifiedFlow
from dlms_engine.processes.grids import default_grid, named_grid
from dlms_engine.solvers.registry import handcrafted_table

FLOW = ("--model", "cli_model:flowing")
FEW = ("--samples", 6, "--batch", 4)


def sampled(seeds: list[int], nfe: int) -> Tensor:
    """What a user would write in Python."""
    model = load_model("cli_model:flowing")
    table = handcrafted_table(model.denoiser.process, "ipndm", nfe, grid="time_uniform")
    labels = torch.tensor([float(seed % 3) for seed in seeds])
    return Sampler(model.denoiser, table).sample(seeds, model.shape, label=labels)


@pytest.mark.parametrize(
    ("process", "name"),
    [(RectifiedFlow(), "time_uniform"), (EDM(), "polynomial"), (VP(), "polynomial")],
)
def test_the_grid_follows_from_the_process(process: Any, name: str) -> None:
    assert default_grid(process) == name
    table = handcrafted_table(process, "ddim", 5)
    assert torch.equal(table.grid, named_grid(process, name, len(table.grid) - 1))


def test_sample_gives_every_seed_its_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.safetensors"
    facts = answer(
        capsys, "sample", *FLOW, "--nfe", 4, "--seeds", "1,5-7", "--batch", 3, "--output", path
    )
    assert "time_uniform" in facts["solver"]
    found = load_file(path)["samples"]
    expected = sampled([1, 5, 6, 7], 4)
    assert torch.equal(found, expected)
    assert not torch.equal(found, sampled([0, 5, 6, 7], 4))  # planted: another seed and label


@pytest.mark.measured_start
def test_evaluate_measures_with_conditions_against_a_proved_solution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = answer(
        capsys, "evaluate", *FLOW, *FEW, "--nfe", 4, "--exact-nfe", 64, "--folder", tmp_path
    )
    model = load_model("cli_model:flowing")
    seeds = range(100_000, 100_006)
    problem = SamplingProblem(model.denoiser, model.shape, model.conditions)
    proof = ExactSolution(problem, samples=4).prove()
    labels = torch.tensor([float(seed % 3) for seed in seeds])
    table = proof.table(model.denoiser.process, 64)
    exact = Sampler(model.denoiser, table).sample(list(seeds), model.shape, label=labels)
    error = (sampled(list(seeds), 4) - exact).square().mean().sqrt()
    assert facts["rmse"] == pytest.approx(float(error), rel=1e-4)
    planted = Sampler(model.denoiser, table).sample(list(seeds), model.shape, label=labels.flip(0))
    wrong = (sampled(list(seeds), 4) - planted).square().mean().sqrt()
    assert facts["rmse"] != pytest.approx(float(wrong), rel=1e-2)


def test_results_kept_for_other_conditions_are_not_taken(tmp_path: Path) -> None:
    from dlms_engine.lab.comparison.store import Store

    model = load_model("cli_model:flowing")

    def ends(labels: Tensor) -> Tensor:
        store = Store(tmp_path)
        features = distance_features(model)
        conditions = {"label": labels}
        measurer = Measurer(
            model.denoiser, features, model.shape, store, batch=4, conditions=conditions
        )
        return measurer.endpoints(48, range(4))

    first = ends(torch.arange(3.0))
    assert torch.equal(first, ends(torch.arange(3.0)))
    assert not torch.equal(first, ends(torch.arange(3.0) + 1))


def test_compare_takes_conditions_and_says_who_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--samples", 4, "--exact-samples", 4, "--exact-nfe", 24, "--accurate-nfe", 8)
    facts = answer(
        capsys, "compare", *FLOW, *few, "--nfe", 3, "--methods", "free_table,ld3", "--budget", 20_000,
        "--screen-samples", 2, "--folder", tmp_path,
    )  # fmt: skip
    rows = {row["solver"]: row for row in facts["rows"] if row["learned"]}
    refused = {name: row["refused"] for name, row in rows.items() if "refused" in row}
    assert list(refused) == ["ld3"], refused
    assert "condition" in refused["ld3"]
    assert all(row["rmse"] > 0 for row in facts["rows"] if "refused" not in row)


def test_a_file_of_conditions_takes_the_place_of_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, path = tmp_path / "labels.safetensors", tmp_path / "raw.safetensors"
    save_file({"label": torch.tensor([1.0, 2.0, 0.0])}, labels)
    some = (*FLOW, "--nfe", 4, "--seeds", "0-2", "--output", path)
    answer(capsys, "sample", *some, "--conditions", labels)
    other = load_file(path)["samples"]
    answer(capsys, "sample", *some)
    assert not torch.equal(load_file(path)["samples"], other)
    model = load_model("cli_model:flowing", conditions=labels)
    assert condition_rows(model, [4])["label"].tolist() == [2.0]
    missing = complaint(capsys, "sample", *some, "--conditions", tmp_path / "none.safetensors")
    assert "none.safetensors" in missing


def test_samples_that_are_no_pictures_need_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = ("--model", "cli_model:plane", "--nfe", 3, "--seeds", "0-1", "--output")
    assert ".safetensors" in complaint(capsys, "sample", *plane, tmp_path / "x.png")
    answer(capsys, "sample", *plane, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["samples"].shape == (2, 2)
    model = load_model("cli_model:plane")
    assert samples_name(model) == "samples.safetensors"
    assert samples_name(load_model("cli_model:tiny")) == "samples.png"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # a plain install
    assert samples_name(load_model("cli_model:tiny")) == "samples.safetensors"


def test_rows_of_conditions_follow_the_numbers() -> None:
    held = {"label": torch.arange(3), "scale": 2.0}
    rows = rows_of(held, [4, 0, (1 << 64) - 1])
    assert rows["label"].tolist() == [1, 0, ((1 << 64) - 1) % 3] and rows["scale"] == 2.0
    assert rows_of(held, range(2), 2)["label"].tolist() == [0, 1, 0, 1]
    assert rows_of(lambda numbers: {"n": numbers}, [5, 2])["n"].tolist() == [5, 2]
    with pytest.raises(ValueError, match="beyond int64"):
        rows_of(lambda numbers: {"n": numbers}, [1 << 63])


def test_a_condition_of_another_length_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "grid" in complaint(capsys, "sample", *FLOW, "--grid", "uniform", "--output", "x.png")
