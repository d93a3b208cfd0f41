"""A toy solver and a toy learner, added as CONTRIBUTING.md says, reach everything that names one.

The lists there are read: every file that they name exists for every solver and learner there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cli_model
import pytest
import torch
from commands import answer, complaint

from dlms_engine import Sampler, distill, grids, load_solver
from dlms_engine.engine.export import trace_sampler
from dlms_engine.learners import LEARNERS, LearnerEntry, RunOptions, register_learner
from dlms_engine.learners.registry import presets
from dlms_engine.learners.settings import plain, split_settings
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import DistilledSolver
from dlms_engine.processes import EDM, Process, RectifiedFlow
from dlms_engine.solvers import SOLVERS, make_solver
from dlms_engine.solvers import file as solver_file
from dlms_engine.solvers.common import Afs, Run
from dlms_engine.solvers.exponential import ExponentialStep
from dlms_engine.solvers.registry import Solver, register_solver
from dlms_engine.solvers.table import SolverTable

ROOT = Path(__file__).parent.parent
TINY = ("--model", "cli_model:tiny")
BUDGET = {
    "nfe": 3, "budget": 2000, "samples": 8, "exact-samples": 6, "exact-nfe": 12, "accurate-nfe": 8,
    "screen-samples": 2, "batch": 4,
}  # fmt: skip


# -- the toys: what a contributor writes ---------------------------------------------------------


def toy_solver(process: Process, grid: torch.Tensor, *, afs: Afs = False) -> SolverTable:
    """Euler in lambda_."""
    run = Run(process, grid, afs=afs)
    x = run.start()
    for i in range(run.steps):
        step = ExponentialStep(run.nodes[i], run.nodes[i + 1], "data")
        out = run.evaluate(x, i)
        x = out.x * step.base + out.data * step.first
    return run.table(x, "toy_solver")


@dataclass(frozen=True)
class ToySettings:
    """``rho`` of the grid is the best of ``choices`` values."""

    nfe: int = 5
    choices: int = 3
    batch: int = 8


def toy_run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    (own,) = split_settings(options.settings, ToySettings)
    if options.trajectories is not None:
        own["batch"] = options.trajectories
    settings = ToySettings(nfe=options.nfe, **own)
    process = denoiser.process
    scale = float(process.sigma(process.t_max))
    noise = scale * torch.randn(settings.batch, *shape, generator=torch.Generator().manual_seed(0))
    tables = [
        make_solver("ddim", process, grids.polynomial(process, settings.nfe, rho))
        for rho in torch.linspace(3, 7, settings.choices).tolist()
    ]
    sizes = [float(Sampler(denoiser, table)(noise).square().mean()) for table in tables]
    best = tables[sizes.index(min(sizes))]
    described = {"method": "toy", **plain(settings)}
    return DistilledSolver(best, "toy", described, [{"size": s} for s in sizes], {"score": 0.0})


TOY = LearnerEntry(
    "toy", toy_run, ToySettings, trajectories="batch", presets={"toy-small": {"choices": 2}}
)


@pytest.fixture
def toys() -> Iterator[None]:
    learners, solvers, methods = dict(LEARNERS), dict(SOLVERS), set(solver_file.METHODS)
    register_learner(TOY)
    register_solver("toy_solver", Solver(toy_solver, 1))
    yield
    for registry, before in ((LEARNERS, learners), (SOLVERS, solvers)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]
    solver_file.METHODS.intersection_update(methods)


# -- the learner ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
def test_a_toy_learner_is_distilled_saved_scheduled_and_exported(tmp_path: Path) -> None:
    model = cli_model.tiny()
    path = tmp_path / "toy.safetensors"
    solver = distill(model.denoiser, "toy", nfe=3, shape=model.shape, output=path, choices=2)
    assert load_solver(path).settings["choices"] == 2
    images = Sampler(model.denoiser, load_solver(path)).sample([0, 1], model.shape)
    assert torch.equal(images, Sampler(model.denoiser, solver).sample([0, 1], model.shape))
    program = trace_sampler(Sampler(model.denoiser, solver), torch.randn(2, *model.shape))
    assert "dlms" not in str(program.graph)
    pytest.importorskip("diffusers")
    from dlms_engine.integrations.diffusers import DLMSScheduler

    for choice in ("toy_solver", str(flow_solver(tmp_path / "flow.safetensors"))):
        scheduler = DLMSScheduler(prediction_type="flow_prediction", solver=choice)
        scheduler.set_timesteps(3)
        x = torch.randn(1, 3, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        assert bool(x.isfinite().all())


def flow_solver(path: Path) -> Path:
    """The toy, learned on a flow."""
    model = cli_model.tiny()
    denoiser = Denoiser(model.denoiser.network, RectifiedFlow(), "flow")
    distill(denoiser, "toy", nfe=3, shape=model.shape, output=path, choices=1)
    return path


@pytest.mark.usefixtures("toys")
def test_a_toy_learner_is_known_to_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "toy.safetensors"
    words = ("distill", *TINY, "--method", "toy", "--nfe", 3, "--trajectories", 4)
    assert answer(capsys, *words, "--output", path)["method"] == "toy"
    assert answer(capsys, "inspect", path)["method"] == "toy"
    preset = (
        "distill",
        *TINY,
        "--preset",
        "toy-small",
        "--nfe",
        3,
        "--output",
        tmp_path / "p.safetensors",
    )
    assert answer(capsys, *preset)["method"] == "toy"
    assert "'gone'" in complaint(
        capsys, *words, "--set", "gone=1", "--output", tmp_path / "q.safetensors"
    )


@pytest.mark.usefixtures("toys")
def test_toys_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("matplotlib")
    options = [word for key, value in BUDGET.items() for word in (f"--{key}", value)]
    found = answer(
        capsys, "compare", *TINY, "--methods", "toy", "--folder", tmp_path / "c", *options
    )
    rows = found["rows"]
    assert isinstance(rows, list)
    assert "toy" in {row["solver"] for row in rows}


# -- the solver ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
def test_a_toy_solver_has_a_name_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_solver("toy_solver", EDM(), grids.polynomial(EDM(), 4))
    assert load_solver(solver_file.write_record(tmp_path / "t", solver_file.record_of(table))).nfe
    drawn = answer(
        capsys, "sample", *TINY, "--method", "toy_solver", "--nfe", 3, "--seeds", "0-1",
        "--output", tmp_path / "s.safetensors",
    )  # fmt: skip
    assert drawn["nfe"] == 3


# -- planted faults ------------------------------------------------------------------------------


def test_without_its_entry_a_toy_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "distill",
        *TINY,
        "--method",
        "toy",
        "--nfe",
        3,
        "--output",
        tmp_path / "t.safetensors",
    )
    assert "method is 'toy'" in complaint(capsys, *words)
    options = ("--method", "toy_solver", "--nfe", 3, "--output", tmp_path / "s.safetensors")
    assert "toy_solver" in complaint(capsys, "sample", *TINY, *options)
    with pytest.raises(ValueError, match="there is a learner 'dlms' already"):
        register_learner(LEARNERS["dlms"])


# -- the lists in CONTRIBUTING.md ----------------------------------------------------------------


def listed(section: str) -> list[str]:
    """Paths with ``<name>`` in the numbered list under ``section``."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {section}")[1].split("\n## ")[0]
    return [path for path in re.findall(r"`([\w/.<>]+)`", text) if "<name>" in path]


def test_every_learner_has_the_files_of_the_list() -> None:
    paths = listed("Add a learner")
    assert len(paths) >= 3
    for name in set(LEARNERS) - {
        "auto"
    }:  # it chooses among the others: an objective has each of those
        for path in paths:
            found = path.replace("<name>", name)
            assert list(ROOT.glob(found)), f"{name}: no {found}"
    assert not list(ROOT.glob(paths[0].replace("<name>", "toy")))


def test_files_know_every_solver_and_learner() -> None:
    """Their names are written in ``tables/file.py``: a file is read before a learner is imported."""
    assert set(LEARNERS) | set(SOLVERS) <= solver_file.METHODS
    assert {settings["method"] for settings in presets().values()} == set(LEARNERS) - {"auto"}
