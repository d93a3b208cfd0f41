"""AMED's training: gradients, phases, restarts, resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from amed_problem import (
    problem,
    run,
    start_noise,
)
from torch import Tensor

from dlms_engine.learners import distill
from dlms_engine.learners.amed.objective import INFINITE_GRADIENT, Amed, clean_gradients
from dlms_engine.learners.amed.settings import AmedSettings
from dlms_engine.learners.training.trainer import Trainer, TrainerSettings
from dlms_engine.policies.amed_formulas import Walk
from dlms_engine.policies.amed_predictor import Choice


@pytest.mark.parametrize("solver", ["amed", "dpm_solver_2", "ipndm", "dpm_solver_pp"])
def test_gradient_against_finite_differences(solver: Any) -> None:
    """Per-step objective in float64, along a random direction of the parameters."""
    _, denoiser = problem()
    learner = Amed(denoiser, AmedSettings(nfe=4, solver=solver, scale_time=0.2), (16,), seed=3)
    learner.module.double()
    parameters = list(learner.module.parameters())
    generator = torch.Generator().manual_seed(7)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def losses() -> Tensor:
        values = [n["loss"] for n in learner.iteration(start_noise())]
        return torch.tensor(values, dtype=torch.float64)

    found = []
    for _ in learner.iteration(start_noise()):
        pairs = [(p.grad, w) for p, w in zip(parameters, ways, strict=True)]
        found.append(sum(float((g * w).sum()) for g, w in pairs if g is not None))
        learner.module.zero_grad()
    step, shifted = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w in zip(parameters, ways, strict=True):
                p.add_(w, alpha=sign * step)
        shifted.append(losses())
        with torch.no_grad():
            for p, w in zip(parameters, ways, strict=True):
                p.add_(w, alpha=-sign * step)
    slope = ((shifted[0] - shifted[1]) / (2 * step)).tolist()
    # the first step only: later ones start from states that moved with the parameters
    assert found[0] == pytest.approx(slope[0], rel=1e-5)
    assert abs(found[0]) > 1e-8
    if learner.settings.restarts_at_teacher:
        assert found[1] == pytest.approx(slope[1], rel=1e-5)
    else:
        assert found[1] != pytest.approx(slope[1], rel=1e-3)


@pytest.mark.parametrize("solver", ["amed", "ipndm"])
def test_the_endpoint_phase_sees_what_sampling_gives(solver: Any) -> None:
    """Its end is the sampler's, its gradient the slope of its loss: nothing is cut between steps."""
    _, denoiser = problem()
    settings = AmedSettings(
        nfe=4, solver=solver, scale_time=0.2, bottleneck=False, endpoint_share=1.0
    )
    learner = Amed(denoiser, settings, (16,), seed=3)
    learner.module.double()
    learner.progress = 0.5
    x = learner._start * start_noise()
    sampled, _ = run(denoiser, learner.policy, x)
    torch.testing.assert_close(learner.student_end(x), sampled, rtol=0, atol=1e-8)
    (numbers,) = list(learner.iteration(start_noise()))
    assert torch.isfinite(numbers["endpoint"])
    weight = learner.module.fc_r.weight  # type: ignore[union-attr]
    index = int(weight.grad.abs().flatten().argmax())
    losses = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            weight.view(-1)[index] += sign * 1e-5
            losses.append(float(learner.endpoint_loss(x)))
    slope = (losses[0] - losses[1]) / 2e-5
    assert abs(slope) > 1e-6
    assert float(weight.grad.flatten()[index]) == pytest.approx(slope, rel=1e-4)


def test_gradients_that_are_not_finite() -> None:
    module = torch.nn.Linear(2, 2)
    module.weight.grad = torch.tensor([[float("nan"), float("inf")], [-float("inf"), 2.0]])
    clean_gradients(module)
    wanted = torch.tensor([[0.0, INFINITE_GRADIENT], [-INFINITE_GRADIENT, 2.0]])
    assert torch.equal(module.weight.grad, wanted)


@pytest.mark.parametrize(
    ("solver", "restart", "teacher"),
    [
        ("amed", "auto", True),
        ("dpm_solver_2", "auto", True),
        ("ddim", "auto", True),
        ("ipndm", "auto", False),
        ("dpm_solver_pp", "auto", False),
        ("amed", "student", False),
        ("ipndm", "teacher", True),
    ],
)
def test_where_the_next_step_starts(solver: Any, restart: Any, teacher: bool) -> None:
    _, denoiser = problem()
    learner = Amed(denoiser, AmedSettings(nfe=4, solver=solver, restart=restart), (16,))
    starts: list[Tensor] = []
    ends: list[Tensor] = []
    step = learner.student_step

    def watched(walk: Walk[Tensor], i: int, x: Tensor) -> tuple[Tensor, Choice]:
        starts.append(x)
        end, choice = step(walk, i, x)
        ends.append(end.detach())
        return end, choice

    learner.student_step = watched  # type: ignore[method-assign]
    list(learner.iteration(start_noise()))
    targets = learner.teacher_states(80 * start_noise())
    assert torch.equal(starts[1], targets[0] if teacher else ends[0])
    assert not torch.equal(targets[0], ends[0])


def test_one_update_for_every_step() -> None:
    _, denoiser = problem()
    own = AmedSettings(nfe=5, validation_samples=2, endpoint_share=0.0)
    learner = Amed(denoiser, own, (16,))
    trainer = Trainer(learner, TrainerSettings(trajectories=8, batch=4, ema_kimg=()), (16,))
    trainer.run(progress=False)
    taken = {int(held["step"]) for held in trainer.optimiser.state.values()}
    assert taken == {2 * 3}


def make_trainer(path: Path | None, *, stop: tuple[int, int] | None = None) -> Trainer:
    """``stop`` = (update, optimiser step within it) raises KeyboardInterrupt there."""
    _, denoiser = problem()
    own = AmedSettings(nfe=4, solver="ipndm", validation_samples=2, endpoint_share=0.0)
    learner = Amed(denoiser, own, (16,))
    original, calls = learner.iteration, [0]

    def iteration(noise: Tensor) -> Iterator[dict[str, float]]:
        for k, numbers in enumerate(original(noise)):
            if stop == (calls[0], k):
                raise KeyboardInterrupt
            yield numbers
        calls[0] += 1

    learner.iteration = iteration  # type: ignore[method-assign]
    settings = TrainerSettings(trajectories=6 * 4, batch=4, ema_kimg=(0.01,), validate_every=2)
    return Trainer(learner, settings, (16,), checkpoint=path, fingerprint=learner.fingerprint())


@pytest.mark.parametrize("stop", [(0, 1), (3, 0), (3, 1)])
def test_resume_is_bit_identical(tmp_path: Path, stop: tuple[int, int]) -> None:
    """Also from the middle of an update, whose first optimiser steps were taken already."""
    whole = make_trainer(None)
    state = whole.run(progress=False)
    path = tmp_path / "run.checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make_trainer(path, stop=stop).run(progress=False)
    continued = make_trainer(path)
    resumed = continued.run(resume=True, progress=False)
    assert (resumed.update, resumed.best_score) == (state.update, state.best_score)
    assert resumed.history == state.history
    pairs = zip(
        whole.learner.module.parameters(), continued.learner.module.parameters(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_distillation_beats_its_start() -> None:
    _, denoiser = problem()
    solver = distill(
        denoiser,
        "amed",
        nfe=6,
        shape=(16,),
        trajectories=32 * 40,
        batch=32,
        progress=False,
        validation_samples=16,
        scale_dir=0.1,
    )
    first = solver.history[0]["validation/raw"]
    assert solver.best["score"] < 0.6 * first
    numbers = solver.history[-1]["describe"]
    assert len(numbers["r"]) == 3 and all(0 < r < 1 for r in numbers["r"])
