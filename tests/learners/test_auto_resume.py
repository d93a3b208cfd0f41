"""A killed run goes on and ends at the same bits; an interrupted one keeps its best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlms_engine import distill
from dlms_engine.learners import auto
from dlms_engine.learners.auto import every_row, gauss_newton
from dlms_engine.learners.auto.budget import Budget
from dlms_engine.learners.auto.progress import RunCheckpoint
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import DistilledSolver
from dlms_engine.processes import RectifiedFlow
from dlms_engine.solvers.table import SolverTable


class Curved(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *([1] * (x.ndim - 1)))
        return x - torch.tanh(3 * x) * (1 + t)


class Killed(BaseException):
    """What no handler expects."""


def run(path: Path, **changes: Any) -> DistilledSolver:
    denoiser = Denoiser(Curved(), RectifiedFlow(t_min=0.01), "flow")
    options = {"budget": "40k", "samples": 256, "progress": False, "effort": "lean", **changes}
    return distill(denoiser, "auto", nfe=2, shape=(4,), output=path, **options)


def killed_after(phase: str, count: int, patch: pytest.MonkeyPatch, path: Path) -> None:
    keep, seen = RunCheckpoint.keep, []

    def keep_and_die(self: RunCheckpoint, at: str, *args: Any, **kwargs: Any) -> None:
        keep(self, at, *args, **kwargs)
        seen.append(at)
        if seen.count(phase) == count:
            raise Killed

    with patch.context() as p, pytest.raises(Killed):
        p.setattr(RunCheckpoint, "keep", keep_and_die)
        run(path)


def bits(solver: DistilledSolver) -> list[Tensor]:
    if isinstance(solver.policy, SolverTable):
        return [solver.policy.times, solver.policy.a, solver.policy.b]
    tensors, _ = solver.policy.state()
    return [tensors[name] for name in sorted(tensors)]


@pytest.mark.slow
def test_a_killed_run_ends_at_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "choose_stage", lambda stages, _: stages[-1])  # all there is
    two = [0, 1]
    monkeypatch.setattr(auto, "bases", lambda start, _: [start.ranking[i].candidate for i in two])
    whole = run(tmp_path / "whole.safetensors")
    assert whole.report["chosen"] in ("corrector", "correctors")
    for number, (phase, count) in enumerate((("trial 2", 1), ("fit", 1), ("corrector", 1))):
        path = tmp_path / f"{number}.safetensors"
        killed_after(phase, count, monkeypatch, path)
        assert path.with_name(f"{number}.checkpoint.safetensors").exists()
        again = run(path, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True)), phase
        assert again.report["calls"] == whole.report["calls"]
        assert not path.with_name(f"{number}.checkpoint.safetensors").exists()
    # planted: a run of another seed is another solver, and a checkpoint of it is refused
    other = run(tmp_path / "other.safetensors", seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(bits(whole), bits(other), strict=True))
    killed_after("fit", 1, monkeypatch, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="another run"):
        run(tmp_path / "b.safetensors", resume=True, seed=1)


@pytest.mark.slow
def test_a_start_that_another_run_left_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the search and the first checkpoint, a run had its evaluations once more."""
    whole = run(tmp_path / "whole.safetensors", budget="6k")
    start = (tmp_path / "whole.start.json").read_bytes()

    def after_the_search(name: str) -> DistilledSolver:
        (tmp_path / f"{name}.start.json").write_bytes(start)
        return run(tmp_path / f"{name}.safetensors", budget="6k")

    again = after_the_search("again")
    assert again.report["calls"] == whole.report["calls"]
    assert again.report["exact"] == whole.report["exact"]
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True))
    monkeypatch.setattr(Budget, "count", lambda *_: None)  # planted
    assert after_the_search("planted").report["calls"] != whole.report["calls"]


def test_an_interrupt_keeps_the_fit_and_the_correctors_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stages(where: Any, name: str, after: int) -> list[str]:
        original, seen = getattr(where, name), []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) > after:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, stop)
            solver = run(tmp_path / f"{name}.safetensors", progress=True)
        assert "interrupted" in capsys.readouterr().out
        return [stage["name"] for stage in solver.report["stages"]]

    assert stages(gauss_newton.GaussNewton, "_iterate", 1) == ["base", "table"]
    kept = stages(every_row.EveryRow, "_update", 20)
    assert kept[:3] == ["base", "table", "corrector"]
