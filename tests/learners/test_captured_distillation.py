"""``distill(capture=True)``: every learner makes the solver that it makes of plain evaluations."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cli_model
import pytest
import torch
from commands import complaint
from standin_driver import StandinCapture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlms_engine import distill
from dlms_engine.engine import captured_calls as module
from dlms_engine.engine.captured_calls import CapturedCalls, captured_calls
from dlms_engine.lab.bench import distill as bench
from dlms_engine.learners import LEARNERS, RunOptions
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.corrector import CorrectedPolicy
from dlms_engine.policies.distilled import DistilledSolver
from dlms_engine.solvers.table import SolverTable

SHORT: dict[str, Any] = {
    "trajectories": 12, "batch": 4, "validation_samples": 4, "validation_steps": 4,
    "validate_every": 0,
}  # fmt: skip
DLMS: dict[str, Any] = {**SHORT, "prediction": "noise", "init": "ipndm", "grid": "polynomial"}
LD3: dict[str, Any] = {
    "trajectories": 4,
    "validation": 4,
    "batch": 2,
    "rounds": 1,
    "rounds_times": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "dlms": {**DLMS, "last_step": "pixels"},
    "dlms, bottleneck": {**DLMS, "last_step": "bottleneck", "detach_features": False},
    "dlms, endpoint": {**DLMS, "last_step": "features", "endpoint_share": 1.0, "afs": False},
    "amed": {**SHORT, "solver": "ipndm"},
    "amed, endpoint": {**SHORT, "solver": "amed", "endpoint_share": 1.0},
    "free_table": {**SHORT, "base": "ipndm", "grid": "polynomial"},
    "ld3": LD3,
    "dode": {"trajectories": 4},
    "gits": {"trajectories": 4},
    "auto": {"budget": "40000calls", "held_out": 8, "samples": 64},
}


def distilled(
    case: str, denoiser: Denoiser, shape: tuple[int, ...], **more: Any
) -> DistilledSolver:
    method = case.split(",")[0]
    nfe = 4 if method in ("amed", "dlms") else 3
    return distill(
        denoiser, method, nfe=nfe, shape=shape, feature_network=cli_model.Means(), progress=False,
        **{**CASES[case], **more},
    )  # fmt: skip


def numbers(solver: DistilledSolver) -> list[Tensor]:
    if isinstance(solver.policy, SolverTable):
        return [solver.policy.times, solver.policy.a, solver.policy.b]
    if isinstance(solver.policy, CorrectedPolicy):
        rows = solver.policy.rows
        return [rows.times, rows.a, rows.b]
    tensors, _ = solver.policy.state()
    return [tensors[name] for name in sorted(tensors)]


def residuals(solver: DistilledSolver) -> list[Tensor]:
    """What the correctors add, on fixed inputs: hundreds of Adam's steps, whose length does not depend
    on a gradient's, move weights apart that make no difference.
    """
    if not isinstance(solver.policy, CorrectedPolicy):
        return []
    found = []
    for part in solver.policy.parts:
        settings = part.settings
        channels = settings.channels * (1 + settings.outputs)
        generator = torch.Generator().manual_seed(channels)
        found.append(part.residual(torch.randn(16, channels, 8, 8, generator=generator)))
    return found


def apart(one: DistilledSolver, other: DistilledSolver) -> list[float]:
    """Root mean square differences of the residuals, in parts of their own."""
    pairs = zip(residuals(one), residuals(other), strict=True)
    return [float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs]


def losses(solver: DistilledSolver) -> list[float]:
    return [float(entry.get("loss", 0)) for entry in solver.history]


def same(found: DistilledSolver, wanted: DistilledSolver) -> None:
    assert losses(found) == pytest.approx(losses(wanted), rel=2e-3)
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)
    assert all(difference < 0.05 for difference in apart(found, wanted))


def test_another_training_has_other_correctors() -> None:
    """Planted for ``same``: the noise of another seed."""
    held = cli_model.tiny()
    one, other = (distilled("auto", held.denoiser, held.shape, seed=seed) for seed in (0, 1))
    with pytest.raises(AssertionError):
        same(one, other)
    assert max(apart(one, one)) == 0 and min(apart(one, other)) > 0.5


@pytest.fixture
def seen(captured: StandinCapture, monkeypatch: pytest.MonkeyPatch) -> list[CapturedCalls]:
    """The captured evaluations of a run, whose counts stay when its graphs are gone."""
    made: list[CapturedCalls] = []
    plain = CapturedCalls.__init__

    def noted(calls: CapturedCalls, *args: Any) -> None:
        plain(calls, *args)
        made.append(calls)

    monkeypatch.setattr(CapturedCalls, "__init__", noted)
    monkeypatch.setattr(module, "REPEATED", 2)
    return made


@pytest.mark.parametrize("case", CASES)
def test_the_solver_is_that_of_plain_evaluations(case: str, seen: list[CapturedCalls]) -> None:
    held = cli_model.tiny()
    want = distilled(case, held.denoiser, held.shape)
    found = distilled(case, held.denoiser, held.shape, capture=True)
    same(found, want)
    stats = seen[0].graphs.stats()
    assert stats["captures"] and stats["replays"] > 3 * stats["captures"]
    assert not stats["failures"] and len(seen[0].graphs) == 0
    assert held.denoiser.calls.through is None


@pytest.mark.parametrize("case", ["dlms", "auto"])
def test_a_condition_a_sample(case: str, seen: list[CapturedCalls]) -> None:
    held = cli_model.labelled()
    more = {"conditions": held.conditions}
    want = distilled(case, held.denoiser, held.shape, **more)
    same(distilled(case, held.denoiser, held.shape, capture=True, **more), want)
    assert seen[0].graphs.stats()["replays"]


@pytest.mark.parametrize("case", ["dlms, endpoint", "free_table"])
def test_guidance(case: str, seen: list[CapturedCalls]) -> None:
    held = cli_model.labelled()
    denoiser = Denoiser(
        held.denoiser.network, held.denoiser.process, "edm",
        guidance_scale=1.5, unconditional={"label": torch.zeros(1)},
    )  # fmt: skip
    more = {"conditions": {"label": torch.ones(1)}}
    want = distilled(case, denoiser, held.shape, **more)
    same(distilled(case, denoiser, held.shape, capture=True, **more), want)
    assert seen[0].graphs.stats()["replays"]


class Issued(TorchDispatchMode):
    """Counts operations outside of replays; what makes a view costs the device nothing."""

    def __init__(self, graphs: StandinCapture) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graphs = graphs
        self.count = 0
        self.updates: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not (self.graphs.replaying or view)
        return func(*args, **(kwargs or {}))

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        self.updates.append(self.count)

    def close(self) -> None: ...


@pytest.mark.parametrize(("method", "times"), [("dlms", 3), ("amed", 1.4)])
def test_what_an_update_issues(
    method: str, times: float, captured: StandinCapture, seen: list[CapturedCalls]
) -> None:
    """Operations of a late update, whose launches a small network's update on a GPU waits for."""
    held = cli_model.tiny()
    issued = []
    for capture in (False, True):
        settings = {**CASES[method], "endpoint_share": 0.0}
        del settings["trajectories"]
        with Issued(captured) as counted:
            options = RunOptions(4, 32, None, False, False, 0, settings, monitor=counted)
            with captured_calls(held.denoiser) if capture else nullcontext():
                LEARNERS[method].run(held.denoiser, held.shape, options)
        issued.append(counted.updates[-2] - counted.updates[-3])
    assert issued[0] > times * issued[1], issued


def test_a_planted_fault_is_caught(
    seen: list[CapturedCalls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the times that are left out."""
    right = module._Evaluation.gradients

    def without(evaluation: Any, inputs: Any, wanted: Any, cotangents: Any) -> tuple[Tensor, ...]:
        found = right(evaluation, inputs, wanted, cotangents)
        return tuple(
            torch.zeros_like(g) if name == "t" else g for g, name in zip(found, wanted, strict=True)
        )

    held = cli_model.tiny()
    want = distilled("dlms", held.denoiser, held.shape)
    monkeypatch.setattr(module._Evaluation, "gradients", without)
    with pytest.raises(AssertionError):
        same(distilled("dlms", held.denoiser, held.shape, capture=True), want)


def test_without_a_gpu_it_is_refused() -> None:
    held = cli_model.tiny()
    with pytest.raises(ValueError, match="cannot be captured here: .* NVIDIA GPU"):
        distilled("dlms", held.denoiser, held.shape, capture=True)
    assert held.denoiser.calls.through is None


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "cli_model:tiny", "--method", "gits", "--nfe", 3, "--capture")
    told = complaint(capsys, "distill", *words, "--output", tmp_path / "s.safetensors")
    assert "cannot be captured here" in told and "NVIDIA GPU" in told
    assert bench.bench_distill(["--capture"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
