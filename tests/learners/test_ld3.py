"""LD3: soft forcing, loop, resume, settings, composition."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from torch import Tensor, nn

from dlms_engine import grids
from dlms_engine.denoiser import Denoiser
from dlms_engine.learners import distill
from dlms_engine.learners.adjoint import walk
from dlms_engine.learners.grid_tools import refine, start_times
from dlms_engine.learners.ld3 import Ld3, Ld3Settings
from dlms_engine.learners.ld3_data import project
from dlms_engine.learners.ld3_grid import (
    LearnedGrid,
)
from dlms_engine.learners.ld3_loop import Ld3Loop
from dlms_engine.learners.sample_loss import sample_loss
from dlms_engine.processes import EDM, RectifiedFlow
from dlms_engine.sampler import Sampler


def mixture(process: Any = None) -> tuple[GaussianMixture, Denoiser]:
    """The analytic problem behind the interface of a network."""
    process = process or EDM()
    network = GaussianMixture(process)
    return network, Denoiser(network, process, "data")


def test_projection() -> None:
    centre = torch.zeros(2, 3, dtype=torch.float64)
    noise = torch.tensor([[3.0, 0.0, 4.0], [0.1, 0.0, 0.0]], dtype=torch.float64)
    inside = project(noise, centre, 1.0)
    assert torch.allclose(inside[0], torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64), atol=1e-15)
    assert torch.equal(inside[1], noise[1])
    assert torch.equal(project(noise, centre, 0.0), centre)


def tiny(**changes: Any) -> dict[str, Any]:
    """Settings of a run of a second."""
    return {
        "train": 6, "validation": 4, "batch": 2, "rounds": 1, "rounds_times": 2, "loss": "l2",
        "teacher_nfe": 12, "radius": 0.05, **changes,
    }  # fmt: skip


def float_problem() -> Denoiser:
    return mixture()[1]


def make_loop(**changes: Any) -> Ld3Loop:
    settings = Ld3Settings(nfe=4, **tiny(**changes))
    return Ld3Loop(Ld3(float_problem(), settings), (16,))


def test_radius_rule() -> None:
    assert abs(Ld3Settings(nfe=4).ball(3 * 32 * 32) - 0.192) < 1e-12
    assert make_loop(radius=None).radius == pytest.approx(0.001 * 16 / 16)


def test_noises_stay_in_the_ball_and_only_improve() -> None:
    """Every moved noise is inside the ball, and the accept test never lets a loss rise."""
    loop = make_loop(lr_noise=50.0)  # far too large a step: many proposals must be refused
    loop._prepare(False)
    loop._begin()
    pairs, refused = loop.pairs["train"], 0
    for k in range(pairs.count):
        own = pairs.own(k)
        before = loop.learner.measure(pairs.noise[own], pairs.target[own])
        old = pairs.noise[own].clone()
        graded = loop._grade("train", k)
        assert graded is not None
        loop._move("train", k, graded)
        after = loop.learner.measure(pairs.noise[own], pairs.target[own])
        assert bool((after <= before + 1e-9).all())
        refused += int((pairs.noise[own] == old).flatten(1).all(1).sum())
        unguarded = old - 50.0 * graded.noise_grad
        assert bool(((unguarded - pairs.centres[own]).norm(dim=1) > loop.radius).any())
    offsets = (pairs.noise - pairs.centres).norm(dim=1)
    assert float(offsets.max()) <= loop.radius * (1 + 1e-5)
    assert float(offsets.max()) > 0 and refused < len(offsets)


def test_phases() -> None:
    """Network times move in the second phase only, step sizes in both."""
    loop = make_loop(rounds=1, rounds_times=0)
    loop.run(progress=False)
    assert float(loop.learner.module.offsets.detach().abs().max()) == 0.0
    loop = make_loop(rounds=0, rounds_times=2, lr_times=0.5)
    loop.run(progress=False)
    assert float(loop.learner.module.offsets.detach().abs().max()) > 0.0
    loop = make_loop(rounds=0, rounds_times=2, lr_times=0.5, decouple=False)
    loop.run(progress=False)
    assert float(loop.learner.module.offsets.detach().abs().max()) == 0.0


def test_patience_first_widens_validation_then_decays() -> None:
    loop = make_loop(patience=2)
    loop._prepare(False)
    loop._begin()
    loop._open_round()
    lr, best = loop.state.lr, loop._store.best["logits"].clone()
    with torch.no_grad():
        loop.learner.module.logits.add_(torch.randn(4))
    for _ in range(2):
        loop._judge(math.inf)
    assert loop.state.whole and loop.state.lr == lr
    assert torch.equal(loop.learner.module.logits.detach(), best), "the best state is reloaded"
    for _ in range(2):
        loop._judge(math.inf)
    assert loop.state.lr == pytest.approx(0.8 * lr) and loop.state.lr_times == 0.1 / 4
    loop.state.round = 1  # second phase: the network times' rate decays too, down to its floor
    for _ in range(2):
        loop._judge(math.inf)
    assert loop.state.lr_times == pytest.approx(0.8 * 0.1 / 4)
    loop.state.lr_times = 1e-6
    for _ in range(2 * loop.settings.stop_at_floor):
        loop._judge(math.inf)
    assert loop.state.finished


def test_noise_rate_halves_when_nothing_moved() -> None:
    loop = make_loop()
    rate = loop.state.lr_noise
    loop.state.moved = True
    loop._close_round()
    assert loop.state.lr_noise == rate
    loop.state.moved = False
    loop._close_round()
    assert loop.state.lr_noise == rate / 2


class Scales:
    """Gaussian data whose coordinates have standard deviations from 0.01 to 3 (EDM)."""

    def __init__(self) -> None:
        self.var = torch.logspace(-2, 0.5, 16, dtype=torch.float64) ** 2
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x * self.var / (self.var + t[:, None] ** 2)

    def exact(self, x: Tensor) -> Tensor:
        return x * torch.sqrt((self.var + 0.002**2) / (self.var + 80.0**2))


@pytest.mark.parametrize("student", ["unipc", "dpm_solver_pp", "ipndm", "euler"])
def test_learning_beats_the_start(student: str) -> None:
    """Fresh noises, endpoint error against the closed form, on data of many scales."""
    network = Scales()
    denoiser = Denoiser(network, EDM(), "data")
    settings = tiny(
        train=20, validation=10, batch=4, rounds=3, rounds_times=3, radius=0.01, lr=0.02,
        student=student, whole=True,
    )  # fmt: skip
    solver = distill(denoiser, "ld3", nfe=5, shape=(16,), progress=False, **settings)
    table = solver.table()
    start = Ld3(denoiser, Ld3Settings(nfe=5, **settings)).table().detach()
    x = 80.0 * torch.randn(64, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact = network.exact(x)
    network.calls = 0
    learned = list(walk(denoiser, table, x))[-1][2]
    assert network.calls == 5 == solver.nfe
    before = (list(walk(denoiser, start, x))[-1][2] - exact).square().mean()
    after = (learned - exact).square().mean()
    assert float(after) < 0.5 * float(before), (float(before), float(after))
    assert table.name == "ld3" and table.options["solver"] == start.name


def run_to(path: Path | None, *, stop_after: int | None = None, resume: bool = False) -> Ld3Loop:
    settings = Ld3Settings(nfe=3, **tiny(patience=2))
    loop = Ld3Loop(
        Ld3(float_problem(), settings), (16,), checkpoint=path, fingerprint={"method": "ld3"}
    )
    if stop_after is not None:
        done, step = 0, loop._step

        def interrupted() -> bool:
            nonlocal done
            done += 1
            if done > stop_after:
                step()  # the parameters have moved, the mini-batch is not finished
                raise KeyboardInterrupt
            return step()

        loop._step = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            loop.run(resume=resume, progress=False)
    else:
        loop.run(resume=resume, progress=False)
    return loop


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """Killed twice in the middle of a mini-batch, in different rounds, and resumed."""
    whole = run_to(None)
    path = tmp_path / "run.checkpoint.safetensors"
    run_to(path, stop_after=2)
    run_to(path, stop_after=3, resume=True)
    resumed = run_to(path, resume=True)
    for name, value in whole.learner.module.named_parameters():
        assert torch.equal(value, dict(resumed.learner.module.named_parameters())[name]), name
    assert whole.state == resumed.state
    for part in ("train", "valid"):
        assert torch.equal(whole.pairs[part].noise, resumed.pairs[part].noise)
    # the fault: without RMSprop's moments the path is another one
    run_to(path, stop_after=2)
    broken = run_to(None)
    broken_loop = Ld3Loop(
        Ld3(float_problem(), Ld3Settings(nfe=3, **tiny(patience=2))), (16,), checkpoint=path,
        fingerprint={"method": "ld3"},
    )  # fmt: skip
    broken_loop._store._load_moments = lambda held: None  # type: ignore[method-assign, assignment]
    broken_loop.run(resume=True, progress=False)
    assert not torch.equal(broken.learner.module.logits, broken_loop.learner.module.logits)


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint.safetensors"
    run_to(path, stop_after=2)
    settings = Ld3Settings(nfe=3, **tiny(patience=2))
    other = Ld3Loop(
        Ld3(float_problem(), settings), (16,), checkpoint=path, fingerprint={"method": "x"}
    )
    with pytest.raises(ValueError, match="other settings"):
        other.run(resume=True, progress=False)


# -- settings and composition ----------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    denoiser = float_problem()
    for bad, words in (
        ({"studnet": "unipc"}, "unknown setting 'studnet'"),
        ({"student": "heun"}, "solver is 'heun'"),
        ({"loss": "vgg"}, "loss is 'vgg'"),
        ({"loss": "bottleneck"}, "feature tap"),
        ({"loss": "lpips"}, "lpips_weights"),
        ({"radius": -1.0}, "radius is -1.0"),
        ({"coordinate": "log"}, "coordinate is 'log'"),
        ({"rounds": 0, "rounds_times": 0}, "at least one round"),
        ({"window": 1.5}, "window is 1.5"),
        ({"variant": "bh3"}, "variant is 'bh3'"),
    ):
        with pytest.raises(ValueError, match=words):
            distill(denoiser, "ld3", nfe=3, shape=(16,), progress=False, **tiny(**bad))


def test_a_callable_is_a_loss() -> None:
    def doubled(student: Tensor, target: Tensor) -> Tensor:
        return 2 * (student - target).square().mean(1)

    solver = distill(float_problem(), "ld3", nfe=3, shape=(16,), progress=False,
                     **tiny(loss=doubled, rounds_times=0))  # fmt: skip
    assert "doubled" in solver.settings["loss"]


def test_learned_times_feed_any_maker(tmp_path: Path) -> None:
    """The solver file of one learner is a grid for another, network times included."""
    path = tmp_path / "ld3.safetensors"
    solver = distill(float_problem(), "ld3", nfe=4, shape=(16,), progress=False, output=path,
                     **tiny(student="ipndm", lr_times=1.0))  # fmt: skip
    table = solver.table()
    for source in (path, str(path), table):
        times = start_times(EDM(), source, 4)
        assert torch.equal(times.grid, table.grid)
        assert times.network is not None and torch.equal(times.network[:-1], table.times)
    module = LearnedGrid(EDM(), times.grid, network_times=times.network)
    assert float((module().network.detach() - times.network).abs().max() / 80) < 1e-12
    again = distill(float_problem(), "ld3", nfe=4, shape=(16,), progress=False,
                    **tiny(init=path, rounds_times=0))  # fmt: skip
    first = again.history[0]["grid"]
    assert np.allclose(first, table.grid.numpy(), rtol=1e-12)
    with pytest.raises(ValueError, match="expected \\[6\\] times"):
        start_times(EDM(), table, 5)
    with pytest.raises(ValueError, match="was made for"):
        start_times(EDM(t_max=60.0), table, 4)


def test_best_start_is_the_least_loss() -> None:
    loop = make_loop(init="best", rounds=1, rounds_times=0)
    loop._prepare(False)
    loop._begin()
    valid = loop.pairs["valid"]
    losses = {}
    for name in ("polynomial", "time_uniform", "time_quadratic", "logsnr"):
        other = make_loop(init=name)
        losses[name] = float(other.learner.measure(valid.noise, valid.target).mean())
    assert loop.state.init == min(losses, key=lambda name: losses[name])
    assert loop.state.history[0]["validation"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_afs_costs_no_evaluation() -> None:
    network, denoiser = mixture()
    solver = distill(denoiser, "ld3", nfe=3, shape=(16,), progress=False,
                     **tiny(afs="dockhorn", student="ipndm"))  # fmt: skip
    network.calls = 0
    Sampler(denoiser, solver, backend="eager")(80.0 * torch.randn(2, 16))
    assert network.calls == 3 == solver.nfe and len(solver.table().grid) == 5


def test_refined_grid_keeps_the_nodes() -> None:
    for process in (EDM(), RectifiedFlow()):
        grid = grids.time_uniform(process, 4)
        fine = refine(process, grid, 5)
        assert torch.equal(fine[::5], grid) and bool((fine.diff() < 0).all()) and len(fine) == 21
