"""The free table: zero training is the base solver, gradients, learning, resume, composition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import GaussianMixture, run_table
from torch import Tensor

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.free_table.objective import FreeTable, FreeTableModule
from dlms_engine.learners.free_table.settings import FreeTableSettings
from dlms_engine.learners.training.base_table import BASES
from dlms_engine.learners.training.trainer import Trainer, TrainerSettings
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow


def problem(process: Process | None = None) -> tuple[GaussianMixture, Denoiser]:
    process = process or EDM()
    network = GaussianMixture(process)
    return network, Denoiser(network, process, "data")


def noise(count: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=["edm", "vp", "flow"])
@pytest.mark.parametrize("base", BASES)
def test_zero_training_is_the_base_solver(base: Any, process: Process) -> None:
    """Samples of the untrained table and of the handcrafted one agree to 1e-12."""
    network, denoiser = problem(process)
    for afs in (False, "dockhorn"):
        settings = FreeTableSettings(nfe=5, base=base, afs=afs, grid="time_quadratic")
        with torch.no_grad():
            table = FreeTableModule(denoiser, settings)()
        grid = grids.time_uniform(process, settings.steps, 2.0)
        made = settings.solver.table(process, grid)
        assert table.depth == 5 and table.nfe == 5
        x = float(process.sigma(grid[0])) * noise()
        network.calls = 0
        found = run_table(table, network, x)
        assert network.calls == 5
        assert float((found - run_table(made, network, x)).abs().max()) < 1e-12
        table.validate()


@pytest.mark.parametrize("loss", ["endpoint", "trajectory"])
def test_gradients_equal_central_differences(loss: Any) -> None:
    """Every kind of parameter, float64, away from the start."""
    _, denoiser = problem()
    settings = FreeTableSettings(nfe=3, base="dpm_solver_pp", loss=loss, teacher_steps=20)
    learner = FreeTable(denoiser, settings, (16,))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.free.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = noise()

    def value() -> float:
        (numbers,) = learner.iteration(batch)
        return float(numbers["loss"])

    learner.free.zero_grad()
    value()
    frozen = {}
    if loss == "trajectory":
        # targets are constants of the loss: hold the teacher still while differencing
        times = learner.free.times().grid.detach()
        x = 80.0 * batch
        frozen = learner._teacher(times, x)
        learner._teacher = lambda grid, x: frozen  # type: ignore[method-assign]
    grads = {k: p.grad.clone() for k, p in learner.free.named_parameters() if p.grad is not None}
    assert set(grads) == {"times.logits", "times.offsets", "outputs", "state"}
    for name, parameter in learner.free.named_parameters():
        grad, flat = grads[name].flatten(), parameter.detach().view(-1)
        for i in range(len(flat)):
            kept = float(flat[i])
            step = 1e-6
            flat[i] = kept + step
            up = value()
            flat[i] = kept - step
            down = value()
            flat[i] = kept
            central = (up - down) / (2 * step)
            if loss == "trajectory" and name == "times.logits":
                continue  # checked below: the target moves with the time
            assert float(grad[i]) == pytest.approx(central, rel=2e-4, abs=1e-5), (name, i)
            if name == "outputs" and i % 3 > i // 3:
                assert float(grad[i]) == 0.0


def test_trajectory_target_moves_along_the_teacher() -> None:
    """The slope is the derivative of the teacher's state in time."""
    _, denoiser = problem()
    learner = FreeTable(
        denoiser, FreeTableSettings(nfe=3, loss="trajectory", interpolation=60), (16,)
    )
    grid, x = learner.free.times().grid.detach(), 80.0 * noise()
    for i in (1, 2):
        h = 1e-3 * float(grid[i])
        moved = grid.clone()
        moved[i] += h
        back = grid.clone()
        back[i] -= h
        up, down = learner._teacher(moved, x)[i][0], learner._teacher(back, x)[i][0]
        slope = learner._teacher(grid, x)[i][1]
        assert slope is not None
        central = (up - down) / (2 * h)
        assert float((slope - central).abs().max()) < 0.02 * float(central.abs().max())


@pytest.mark.parametrize("loss", ["endpoint", "trajectory"])
def test_training_beats_the_base(loss: Any) -> None:
    """Fresh noises: at most two thirds of the base solver's error after a few dozen updates."""
    network, denoiser = problem()
    solver = distill(
        denoiser, "free_table", nfe=5, shape=(16,), trajectories=2560, batch=64, lr=1e-2,
        progress=False, loss=loss, validate_every=10, validation_samples=128, ema_kimg=(0.2,),
    )  # fmt: skip
    table = solver.table()
    base = FreeTableSettings(nfe=5).solver.table(EDM(), grids.polynomial(EDM(), 6))
    fine = solvers.dpm_solver_pp(EDM(), grids.logsnr(EDM(), 200), order=3)
    x = 80.0 * noise(256, 11)
    exact = run_table(fine, network, x)
    before, after = (
        float((run_table(t, network, x) - exact).square().mean().sqrt()) for t in (base, table)
    )
    assert after < 2 / 3 * before, (before, after)
    assert solver.best["score"] < solver.history[0]["rmse"]


def test_what_is_not_learned_stays() -> None:
    names = ("learn_times", "learn_network_times", "learn_weights", "learn_state")
    inside = ("times.logits", "times.offsets", "outputs", "state")
    for name, parameter in zip(names, inside, strict=True):
        _, denoiser = problem()
        off = {other: other == name for other in names}
        learner = FreeTable(denoiser, FreeTableSettings(nfe=3, validation_samples=4, **off), (16,))
        before = {k: v.detach().clone() for k, v in learner.free.named_parameters()}
        training = TrainerSettings(trajectories=8, batch=4, ema_kimg=(1.0,), validate_every=0)
        trainer = Trainer(learner, training, (16,))
        trainer._update()
        moved = {
            k for k, v in learner.free.named_parameters() if not torch.equal(v.detach(), before[k])
        }
        assert moved == {parameter}


def test_sum_to_base() -> None:
    _, denoiser = problem()
    for wanted in (True, False):
        module = FreeTableModule(denoiser, FreeTableSettings(nfe=4, sum_to_base=wanted))
        with torch.no_grad():
            module.outputs.normal_(generator=torch.Generator().manual_seed(0))
            change = module().b.sum(-1) - module.base_table().b.sum(-1)
        assert bool((change.abs() < 1e-10).all()) == wanted


def small(path: Path | None, stop: int | None = None, resume: bool = False) -> Any:
    _, denoiser = problem()
    settings = FreeTableSettings(nfe=3, validation_samples=4, teacher_steps=8)
    learner = FreeTable(denoiser, settings, (16,))
    training = TrainerSettings(trajectories=24, batch=4, ema_kimg=(0.01,), validate_every=2)
    trainer = Trainer(learner, training, (16,), checkpoint=path, fingerprint={"a": 1})
    if stop is None:
        trainer.run(resume=resume, progress=False)
        return learner
    update, done = trainer._update, 0

    def interrupted() -> dict[str, float]:
        nonlocal done
        if done == stop:
            raise KeyboardInterrupt
        done += 1
        return update()

    trainer._update = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run(resume=resume, progress=False)
    return learner


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    path = tmp_path / "free.checkpoint.safetensors"
    whole = small(None)
    small(path, stop=2)
    small(path, stop=3, resume=True)
    resumed = small(path, resume=True)
    for name, value in whole.free.named_parameters():
        assert torch.equal(value, dict(resumed.free.named_parameters())[name]), name
    assert float(whole.free.outputs.detach().abs().max()) > 0


def test_starts_from_another_learner(tmp_path: Path) -> None:
    """LD3's grid and network times, and a table of another base on them."""
    _, denoiser = problem()
    path = tmp_path / "ld3.safetensors"
    ld3 = distill(
        denoiser, "ld3", nfe=4, shape=(16,), train=4, validation=2, rounds=1, rounds_times=1,
        loss="l2", teacher_nfe=8, lr_times=1.0, student="ipndm", output=path, progress=False,
    )  # fmt: skip
    settings = FreeTableSettings(nfe=4, base="unipc", grid=str(path), afs=False)
    with torch.no_grad():
        table = FreeTableModule(denoiser, settings)()
    learned = ld3.table()
    assert float(((table.grid - learned.grid) / learned.grid).abs().max()) < 1e-12
    assert float(((table.times - learned.times) / learned.times).abs().max()) < 1e-12
    made = solvers.unipc(
        EDM(), learned.grid, network_times=torch.cat([learned.times, learned.t_end[None]])
    )
    assert float((table.b[:, : made.depth] - made.b).abs().max()) < 1e-10


def test_solver_file(tmp_path: Path) -> None:
    from dlms_engine.policies.distilled import load_solver

    network, denoiser = problem()
    path = tmp_path / "free.safetensors"
    solver = distill(
        denoiser, "free_table", nfe=3, shape=(16,), trajectories=8, batch=4, progress=False,
        validation_samples=4, output=path,
    )  # fmt: skip
    x = 80.0 * noise().float()
    network.calls = 0
    found = Sampler(denoiser, solver, backend="eager")(x)
    assert network.calls == 3 and solver.table().name == "free_table"
    loaded: Any = load_solver(path)
    assert torch.equal(found, Sampler(denoiser, loaded, backend="eager")(x))
    assert not path.with_suffix(".checkpoint.safetensors").exists()


def test_bad_settings_are_refused() -> None:
    denoiser = problem()[1]
    for bad, words in (
        ({"bsae": "ipndm"}, "unknown setting 'bsae'"),
        ({"base": "heun"}, "base is 'heun'"),
        ({"base": "ddim", "order": 2}, "first order"),
        ({"loss": "l2"}, "loss is 'l2'"),
        ({"depth": 0}, "depth is 0"),
        ({"last_step": "bottleneck"}, "feature tap"),
        ({"grid": "cosine"}, "grid is 'cosine'"),
        ({"afs": "yes"}, "afs is 'yes'"),
        (
            dict.fromkeys(
                ("learn_times", "learn_network_times", "learn_weights", "learn_state"), False
            ),
            "nothing is learned",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            distill(
                denoiser, "free_table", nfe=3, shape=(16,), trajectories=4, progress=False, **bad
            )
