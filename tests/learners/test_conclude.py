"""What a run ends with: never behind its base, unless told so, and its teacher measured."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from analytic import GaussianMixture
from mixture_network import mixture_denoiser

from dlms_engine.cli.outcome import outcome_lines
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.start import ExactSolution, SamplingProblem, rmse
from dlms_engine.learners.start.nearer import contest, tied
from dlms_engine.learners.training.conclude import EndOf, Measure, standard_tables
from dlms_engine.learners.training.validation import exact_solution
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import load_solver
from dlms_engine.processes import RectifiedFlow

# a rate that ruins whatever it trains
BAD: dict[str, dict[str, Any]] = {
    "amed": {"solver": "ipndm", "grid": "polynomial", "lr": 3.0, "trajectories": 64, "batch": 32,
             "endpoint_share": 0.0, "validation_samples": 4, "validation_steps": 8},
    "dode": {"solver": "ddim", "alignment": "official"},
    "gits": {"solver": "ipndm", "points": 12, "trajectories": 8, "candidates": "searched"},
    "ld3": {"student": "ipndm", "init": "time_uniform", "loss": "l2", "train": 4, "validation": 2,
            "rounds": 1, "rounds_times": 0, "teacher_nfe": 4},
}  # fmt: skip


def run(method: str, **changes: Any) -> Any:
    given = {**BAD[method], "nfe": 4, "shape": (16,), "progress": False, **changes}
    return distill(mixture_denoiser(), method, **given)


@pytest.mark.parametrize("method", ["amed", "dode", "ld3"])
def test_the_base_is_kept_where_learning_made_it_worse(method: str, tmp_path: Any) -> None:
    solver = run(method, output=tmp_path / "solver.safetensors")
    compared = solver.best["compared"]
    assert compared["kept"] == "base" and compared["base_rmse"] < compared["learned"]
    assert solver.best["set"] == f"the base, {compared['base']}"
    assert load_solver(tmp_path / "solver.safetensors").best["compared"] == compared
    problem = SamplingProblem(mixture_denoiser(), (16,))
    numbers = range(1 << 25, (1 << 25) + 128)
    exact = ExactSolution(problem)
    exact.prove(0.05)
    noise, target = problem.noise(numbers), exact.solve(numbers)
    # planted: what the same run learned is behind it on fresh samples
    errors = [
        rmse(Sampler(problem.denoiser, each)(noise), target)
        for each in (solver, run(method, keep="learned"))
    ]
    assert errors[0] < errors[1]
    said = "\n".join(outcome_lines(method, solver.settings, solver.history, solver.best))
    assert "is kept" in said and compared["base"] in said


@pytest.mark.parametrize("method", BAD)
def test_a_method_to_the_letter_says_that_its_base_and_its_teacher_are_no_better(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {} if method == "gits" else {"keep": "learned"}
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        solver = run(method, **changes)
    compared = solver.best["compared"]
    assert compared["kept"] == "learned"
    worse = compared["base_rmse"] < compared["learned"]
    assert worse == ("worse than its base" in caplog.text)
    coarse = compared["teacher"] >= min(compared["learned"], compared["base_rmse"])
    assert coarse == ("its teacher ends" in caplog.text)
    assert method == "gits" or worse


def test_a_good_teacher_and_a_better_student_are_not_mentioned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        solver = distill(
            flow(1.0), "dode", nfe=5, shape=(16,), solver="ddim", scale=40, progress=False
        )
    assert solver.best["compared"]["kept"] == "learned" and not caplog.text


def test_the_official_alignment_is_measured_and_refused() -> None:
    """Its targets are not at the student's times: worse than plain DDIM on this model."""
    kept, literal = run("dode", nfe=10), run("dode", nfe=10, keep="learned")
    assert kept.history == literal.history
    assert kept.best["compared"]["kept"] == "base"
    assert run("dode", nfe=10, alignment="interval").best["compared"]["kept"] == "learned"


def flow(t_max: float) -> Denoiser:
    process = RectifiedFlow(t_min=0.001, t_max=t_max)
    mixture = GaussianMixture(process)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        data = mixture(x, t)
        return (x - data) / t[:, None]

    return Denoiser(velocity, process, "flow")


def test_flows_from_pure_noise() -> None:
    """D-iPNDM stores data there; AMED on DPM-Solver++ and DLMS on noise say what to use."""
    quick = {"shape": (16,), "nfe": 4, "progress": False}
    solver = distill(flow(1.0), "dode", solver="ipndm", keep="learned", **quick)
    assert solver.policy.prediction == "data"
    assert solver.best["compared"]["learned"] < solver.best["compared"]["base_rmse"]
    amed = {
        "solver": "dpm_solver_pp",
        "grid": "time_uniform",
        "trajectories": 8,
        "batch": 8,
        "validation_samples": 2,
    }
    with pytest.raises(ValueError, match=r"RectifiedFlow\(t_max=0.999\)"):
        distill(flow(1.0), "amed", **amed, **quick)
    assert distill(flow(0.999), "amed", **amed, **quick).policy.process.t_max == 0.999
    with pytest.raises(ValueError, match="prediction is 'noise' and alpha is 0"):
        distill(flow(1.0), "dlms", prediction="noise", **quick)


def test_bases_that_chance_could_have_put_first_are_run_on_more_samples() -> None:
    """Of two equal bases neither wins, of two apart one does: only the first two are run again."""
    p = SamplingProblem(mixture_denoiser(), (16,))
    measure = Measure(p.denoiser, p)

    def end(error: float) -> EndOf:
        generator = torch.Generator().manual_seed(int(1e4 * error))

        def run(noise: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
            scatter = error * torch.randn(noise.shape, generator=generator)
            return exact_solution(p.denoiser, noise, 48) + scatter

        return run

    runs = {"": end(0.3), "a": end(0.1), "b": end(0.1001), "c": end(0.5)}

    def measured(names: list[str], numbers: range) -> dict[str, torch.Tensor]:
        return {name: measure.squares(runs[name], numbers) for name in names}

    found, left = contest(runs, measured, 64, 256, [""])
    sizes = {name: len(square) for name, square in found.items()}
    assert sizes == {"": 256, "a": 256, "b": 256, "c": 64} and set(left) == {"a", "b"}
    runs = {"": end(0.1), "a": end(0.3), "b": end(0.3001)}
    found, left = contest(runs, measured, 64, 256, [""])
    assert {len(square) for square in found.values()} == {64} and left == [""]  # nothing to decide
    same = torch.rand(64, dtype=torch.float64)
    assert tied({"a": same, "b": same.clone(), "c": same + math.inf}) == ["a"]


def test_standard_tables_leave_out_what_does_not_fit() -> None:
    process = mixture_denoiser().process
    odd = standard_tables(process, "dpm_solver_2", 5, {}, (False, True))
    assert odd and all(name.endswith("afs-dockhorn") for name in odd)
    assert {table.nfe for table in odd.values()} == {5}
