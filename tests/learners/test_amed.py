"""AMED: reference trajectories and gradients, neutral plugins, training and files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from amed_problem import (
    CASES,
    SUFFIX,
    Given,
    problem,
    random_choices,
    reference,
    reference_predictor,
    start_noise,
)
from torch import Tensor

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.amed.objective import INFINITE_GRADIENT, Amed, clean_gradients
from dlms_engine.learners.amed.settings import AmedSettings
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.dlms.teacher import TeacherSettings
from dlms_engine.learners.presets import PRESETS
from dlms_engine.learners.registry import preset
from dlms_engine.learners.settings import split_settings
from dlms_engine.learners.training.trainer import Trainer, TrainerSettings
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase, Walk
from dlms_engine.policies.amed_predictor import AmedPredictor, Choice
from dlms_engine.policies.distilled import load_solver, save_solver
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow

TOLERANCE = 1e-10
TRAINING = f"train_ipndm__both__poly7__N4__M2__{SUFFIX[-4:]}"


def run(denoiser: Denoiser, policy: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = Sampler(denoiser, policy, dtype=torch.float64)(x, return_trajectory=True)
    assert isinstance(out, tuple)
    return out


# -- reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(80.0, 10.0), (1.5, 0.002)])
def test_predictor_equals_the_reference(levels: tuple[float, float]) -> None:
    key = f"predictor_both/io_{levels[0]}_{levels[1]}"
    features = reference(key + "/in").flatten(1)
    told = [torch.full((3,), v, dtype=torch.float64) for v in levels]
    found = torch.stack(reference_predictor()(features, *told), dim=1)
    torch.testing.assert_close(found, reference(key + "/out"), rtol=0, atol=TOLERANCE)
    swapped = torch.stack(reference_predictor()(features, *told[::-1]), dim=1)
    assert (swapped - found).abs().max() > 1e-3  # the check can fail


@pytest.mark.parametrize("case", CASES)
def test_trajectories_equal_the_reference(case: str) -> None:
    key = f"amed_{case}{SUFFIX}"
    network, denoiser = problem()
    policy = AmedPolicy(reference_predictor(), CASES[case], denoiser.process, reference(key + "/t"))
    end, states = run(denoiser, policy, 80 * start_noise())
    assert network.calls == policy.nfe == 6
    torch.testing.assert_close(states[::2], reference(key + "/x"), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(end, reference(key + "/x")[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("head", ["fc_r", "fc_scale_dir", "fc_scale_time"])
@pytest.mark.parametrize("case", ["amed", "ipndm_o3", "dpmpp_3m_x0_lof1"])
def test_every_choice_matters_to_the_reference(case: str, head: str) -> None:
    """The fault: one head of the predictor is moved by a hair."""
    key = f"amed_{case}{SUFFIX}"
    _, denoiser = problem()
    predictor = reference_predictor()
    with torch.no_grad():
        getattr(predictor, head).bias += 1e-4
    policy = AmedPolicy(predictor, CASES[case], denoiser.process, reference(key + "/t"))
    _, states = run(denoiser, policy, 80 * start_noise())
    assert (states[::2] - reference(key + "/x")).abs().max() > 1e4 * TOLERANCE


def reference_learner(**changes: Any) -> Amed:
    _, denoiser = problem()
    settings = AmedSettings(nfe=6, solver="ipndm", scale_time=0.2, **changes)
    learner = Amed(denoiser, settings, (16,))
    learner.module.double().load_state_dict(reference_predictor().state_dict())
    return learner


def gradients(learner: Amed) -> list[tuple[float, Tensor]]:
    """(loss, flat gradient) of every step, without updates."""
    found = []
    for numbers in learner.iteration(start_noise()):
        parts = [p.grad for p in learner.module.parameters()]
        assert all(p is not None for p in parts)
        found.append((numbers["loss"], torch.cat([p.flatten() for p in parts if p is not None])))
        learner.module.zero_grad()
    return found


def test_training_pass_equals_the_reference() -> None:
    learner = reference_learner()
    teacher = torch.stack(learner.teacher_states(80 * start_noise()))
    torch.testing.assert_close(teacher, reference(TRAINING + "/teacher"), rtol=0, atol=TOLERANCE)
    for i, (loss, gradient) in enumerate(gradients(learner)):
        assert loss == pytest.approx(float(reference(TRAINING + "/loss")[i]), rel=TOLERANCE)
        encoder = gradient[72 : 72 + 128 * 64]
        rest = torch.cat([gradient[:72], gradient[72 + 128 * 64 :]])
        for found, name in ((rest, "rest"), (encoder.reshape(128, 64).sum(1), "encoder_sums")):
            wanted = reference(f"{TRAINING}/grad_{name}")[i]
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=TOLERANCE)


@pytest.mark.parametrize("changes", [{"restart": "teacher"}, {"interpolation": 1}, {"order": 3}])
def test_the_training_check_can_fail(changes: dict[str, Any]) -> None:
    losses = [loss for loss, _ in gradients(reference_learner(**changes))]
    wanted = reference(TRAINING + "/loss").tolist()
    assert max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True)) > 1e-3


# -- the formulas -------------------------------------------------------------------------------


def doubled(process: Process, grid: Tensor, given: Given) -> Tensor:
    """``[B, 2 steps + 1]``: the grid with every sample's own middles."""
    level = process.sigma_over_alpha(grid).log()
    columns: list[Tensor] = []
    for i, choice in enumerate(given.said):
        middle = process.inverse_sigma((level[i] + choice.r * (level[i + 1] - level[i])).exp())
        columns += [grid[i].expand_as(middle), middle]
    return torch.stack([*columns, grid[-1].expand_as(columns[0])], dim=-1)


PLUGINS: dict[str, tuple[AmedBase, Any, dict[str, Any]]] = {
    "ddim": (AmedBase("ddim"), solvers.ddim, {"prediction": "noise"}),
    **{f"ipndm{p}": (AmedBase("ipndm", p), solvers.ipndm, {"order": p}) for p in (1, 2, 3, 4)},
    **{
        f"dpmpp{p}-{kind}": (
            AmedBase("dpm_solver_pp", p, kind),
            solvers.dpm_solver_pp,
            {"order": p, "prediction": kind},
        )
        for p in (1, 2, 3)
        for kind in ("data", "noise")
    },
}
PROCESSES = {"edm": EDM(), "vp": VP()}


def policy_rows(policy: AmedPolicy, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale, a, b, times) as a batched table has them."""
    walk = policy.start(batch, torch.device("cpu"))
    times, a, b = [walk.time], [], []
    for n in range(policy.nfe):
        row = walk.row(n, torch.zeros(batch, 64))
        a.append(row.a)
        b.append(row.b)
        if row.next_time is not None:
            times.append(row.next_time)
    scale = walk.initial_scale.expand(batch)
    return scale, torch.stack(a, -1), torch.stack(b, -2), torch.stack(times, -1)


def neutral(name: str, process: Process, *, afs: bool, steps: int = 3) -> tuple[AmedPolicy, Any]:
    """A plugin with neutral scales, and the handcrafted table of every sample's doubled grid."""
    base, maker, options = PLUGINS[name]
    grid = grids.polynomial(process, steps)
    given = random_choices(steps, 5, neutral=True)
    policy = AmedPolicy(given, dataclasses.replace(base, afs=afs), process, grid)
    return policy, maker(process, doubled(process, grid, given), afs=afs, **options)


@pytest.mark.parametrize("afs", [False, True], ids=["", "afs"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", PLUGINS)
def test_neutral_plugin_is_the_handcrafted_solver(name: str, process: str, afs: bool) -> None:
    """Per-sample middles, scales 1: the rows are those of the solver on the doubled grids."""
    policy, table = neutral(name, PROCESSES[process], afs=afs)
    assert (policy.nfe, policy.prediction) == (table.nfe, table.prediction)
    assert policy.depth >= table.depth
    scale, a, b, times = policy_rows(policy, 5)
    width = table.depth
    for found, wanted in (
        (scale, table.initial_scale),
        (a, table.a),
        (b[..., :width], table.b),
        (times, table.times),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert not b[..., width:].any()


def test_the_neutral_check_can_fail() -> None:
    policy, table = neutral("ipndm4", EDM(), afs=True)
    policy.base = dataclasses.replace(policy.base, order=3)
    _, _, b, _ = policy_rows(policy, 5)
    assert (b[..., : table.depth] - table.b[..., : b.shape[-1]]).abs().max() > 1e-2


@pytest.mark.parametrize("afs", [False, True], ids=["", "afs"])
@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_two_stage_solvers_at_one_half_are_dpm_solver_2(process: Process, afs: bool) -> None:
    """r = 1/2 and neutral scales: AMED-Solver and its plugin on DPM-Solver-2 are DPM-Solver-2."""
    grid = grids.time_uniform(process, 3)
    _, denoiser = problem(process)
    x = float(process.sigma(grid[0])) * start_noise()
    wanted, _ = run(denoiser, solvers.dpm_solver_2(process, grid, afs=afs), x)
    half = torch.full((3, 8), 0.5, dtype=torch.float64)
    one = torch.ones_like(half)
    for name in ("amed", "dpm_solver_2"):
        policy = AmedPolicy(Given(half, one, one), AmedBase(name, afs=afs), process, grid)
        found, _ = run(denoiser, policy, x)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        moved = AmedPolicy(Given(half + 0.01, one, one), AmedBase(name, afs=afs), process, grid)
        assert (run(denoiser, moved, x)[0] - wanted).abs().max() > 1e-6


WALKS = [
    AmedBase("amed"),
    AmedBase("ddim"),
    AmedBase("dpm_solver_2"),
    AmedBase("ipndm", 2),
    AmedBase("ipndm", 4),
    AmedBase("dpm_solver_pp", 3),
    AmedBase("dpm_solver_pp", 3, "noise"),
]


@pytest.mark.parametrize("afs", [False, True], ids=["", "afs"])
@pytest.mark.parametrize("base", WALKS, ids=lambda b: f"{b.solver}-{b.order}-{b.prediction}")
@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_sampling_is_what_training_does(process: Process, base: AmedBase, afs: bool) -> None:
    """Rows over the history ring against the same formulas on images, all choices at work."""
    if base.solver == "dpm_solver_pp" and process.name == "rectified_flow":
        with pytest.raises(ValueError, match="infinite"):
            AmedPolicy(random_choices(3, 8, neutral=False), base, process, torch.tensor([1.0, 0.0]))
        return
    network, denoiser = problem(process)
    grid = grids.time_uniform(process, 4)
    given = random_choices(4, 8, neutral=False)
    policy = AmedPolicy(given, dataclasses.replace(base, afs=afs), process, grid)
    x = float(process.sigma(grid[0])) * start_noise()
    end, states = run(denoiser, policy, x)
    assert network.calls == policy.nfe == 8 - afs

    def scaled(weight: Tensor, value: Tensor) -> Tensor:
        return weight[:, None] * value if weight.ndim else weight * value

    walk: Walk[Tensor] = Walk(policy.base, process, grid, scaled)
    for i, choice in enumerate(given.said):
        kind = policy.prediction
        m = walk.analytic(x) if afs and i == 0 else denoiser.predict(x, grid[i], kind)
        y = walk.first(i, x, m, choice)
        x = walk.second(i, x, y, denoiser.predict(y, walk.middle(i, choice)[1], kind), choice)
        torch.testing.assert_close(states[2 * (i + 1) - afs], x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 8])
def test_call_counts(nfe: int) -> None:
    network, denoiser = problem()
    learner = Amed(denoiser, AmedSettings(nfe=nfe, validation_samples=2), (16,))
    network.calls = 0
    Sampler(denoiser, learner.policy)(80 * start_noise().float())
    assert network.calls == nfe == learner.policy.nfe


def test_features_come_from_the_start_of_the_step() -> None:
    """Zeros with AFS at the first step; then the bottleneck of the step's first evaluation."""
    network, denoiser = problem()
    given = random_choices(3, 8, neutral=False)
    policy = AmedPolicy(given, AmedBase("amed", afs=True), EDM(), grids.polynomial(EDM(), 3))
    _, states = run(denoiser, policy, 80 * start_noise())
    assert given.seen[0] is None and len(given.seen) == 3
    for i, at in ((1, 1), (2, 3)):
        level = policy.grid[i].expand(8)
        wanted = network.bottleneck(states[at], level).mean(1).flatten(1)
        torch.testing.assert_close(given.seen[i], wanted, rtol=0, atol=1e-12)


# -- the predictor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "count"), [((0, 0), 8929), ((0.01, 0), 8950), ((0.01, 0.2), 8971)]
)
def test_published_sizes(scales: tuple[float, float], count: int) -> None:
    predictor = AmedPredictor(64, *scales)
    assert sum(p.numel() for p in predictor.parameters()) == count
    said = predictor(None, torch.full((2,), 80.0), torch.full((2,), 1.0))
    assert all(v.shape == (2,) and v.dtype == torch.float64 for v in said)
    assert (said.scale_dir - 1).abs().max() <= scales[0]
    assert (said.scale_time - 1).abs().max() <= scales[1]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_small_batches_are_not_misread(batch: int) -> None:
    """One number per sample even where a batch of 2 or 3 could pass for (r, scales)."""
    predictor = AmedPredictor(64, 0.0, 0.0)
    features = torch.randn(batch, 64, generator=torch.Generator().manual_seed(0))
    said = predictor(features, torch.full((batch,), 80.0), torch.full((batch,), 1.0))
    assert said.r.shape == (batch,) and torch.equal(said.scale_dir, torch.ones(batch))


def test_other_bottlenecks() -> None:
    said = AmedPredictor(16)(torch.zeros(3, 16), torch.ones(3), torch.ones(3))
    assert said.r.shape == (3,)
    with pytest.raises(ValueError, match=r"expected \[B, 16\]"):
        AmedPredictor(16)(torch.zeros(3, 64), torch.ones(3), torch.ones(3))


# -- training -----------------------------------------------------------------------------------


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


# -- files, export, settings --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solver_file_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    _, denoiser = problem()
    predictor = AmedPredictor(64, 0.01, 0.2).to(dtype)
    base = AmedBase("dpm_solver_pp", 2, "noise", lower_order_final=False, afs=True)
    policy = AmedPolicy(predictor, base, EDM(), grids.logsnr(EDM(), 3))
    x = 80 * start_noise().float()
    loaded = load_solver(save_solver(tmp_path / "amed.safetensors", policy))
    assert isinstance(loaded, AmedPolicy) and loaded.base == base
    assert torch.equal(Sampler(denoiser, loaded)(x), Sampler(denoiser, policy)(x))


def test_damaged_states_are_refused() -> None:
    policy = AmedPolicy(AmedPredictor(64), AmedBase(), EDM(), grids.polynomial(EDM(), 3))
    tensors, settings = policy.state()
    for broken in (
        {k: v for k, v in tensors.items() if k != "fc_r.bias"},
        {k: v for k, v in tensors.items() if k != "grid"},
        {**tensors, "extra": torch.zeros(1)},
        {**tensors, "fc_r.weight": torch.zeros(1, 3)},
        {**tensors, "grid": tensors["grid"].flip(0)},
    ):
        with pytest.raises(ValueError):
            AmedPolicy.from_state(broken, settings)
    with pytest.raises(ValueError, match="solver"):
        AmedPolicy.from_state(tensors, {**settings, "base": {"solver": "euler"}})
    assert AmedPolicy.from_state(tensors, settings).nfe == 6  # the intact one loads


@pytest.mark.parametrize("nfe", [5, 6])
def test_static_table(tmp_path: Path, nfe: int) -> None:
    """Exact when all samples are told the same; close, not equal, when they are not."""
    _, denoiser = problem()
    x = 80 * start_noise()
    alike = distill(
        denoiser,
        "amed",
        nfe=nfe,
        shape=(16,),
        trajectories=64,
        progress=False,
        bottleneck=False,
        solver="ipndm",
        scale_time=0.2,
        output=tmp_path / "amed.safetensors",
        validation_samples=2,
        keep="learned",
    )
    table = alike.table(denoiser, x)
    assert table.nfe == nfe
    end, _ = run(denoiser, alike, x)
    torch.testing.assert_close(run(denoiser, table, x)[0], end, rtol=1e-10, atol=1e-10)
    loaded = load_solver(tmp_path / "amed.safetensors")
    assert torch.equal(run(denoiser, loaded, x)[0], end)
    varied = distill(
        denoiser,
        "amed",
        nfe=nfe,
        shape=(16,),
        trajectories=64,
        progress=False,
        solver="ipndm",
        scale_time=0.2,
        validation_samples=2,
        keep="learned",
    )
    gap = run(denoiser, varied.table(denoiser, x), x)[0] - run(denoiser, varied, x)[0]
    assert gap.abs().max() > 1e-9


def test_any_grid_drives_amed() -> None:
    """Explicit times and another solver's table; the teacher refines each of their steps."""
    process = EDM()
    table = solvers.ipndm(process, grids.logsnr(process, 3))
    for source in (table, table.grid.tolist()):
        settings = AmedSettings(nfe=6, grid=source)
        grid, fine = settings.grids(process)
        assert torch.equal(grid, table.grid) and torch.equal(fine[::2], grid)
    with pytest.raises(ValueError, match="expected"):
        AmedSettings(nfe=6, grid=(80.0, 0.002)).grids(process)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 5, "afs": False}, "odd nfe"),
        ({"nfe": 4, "afs": True}, "even one"),
        ({"nfe": 0}, "nfe is 0"),
        ({"solver": "unipc"}, "solver is 'unipc'"),
        ({"order": 2}, "fixed order"),
        ({"solver": "ipndm", "order": 5}, "1..4"),
        ({"solver": "dpm_solver_pp", "prediction": "velocity"}, "prediction is"),
        ({"teacher": "unipc"}, "teacher is 'unipc'"),
        ({"interpolation": -1}, "interpolation is -1"),
        ({"restart": "never"}, "restart is"),
        ({"scale_dir": 1.5}, "scale_dir is 1.5"),
        ({"momentum": 0.9}, "unknown setting 'momentum'"),
        ({"grid": "cosine"}, "grid is 'cosine'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    _, denoiser = problem()
    with pytest.raises(ValueError, match=message):
        distill(denoiser, "amed", shape=(16,), progress=False, trajectories=4, **settings)


def test_without_a_tap_every_sample_gets_the_same_choices(caplog: pytest.LogCaptureFixture) -> None:
    network, _ = problem()
    with caplog.at_level(logging.INFO, "dlms_engine"):
        learner = Amed(Denoiser(network, EDM(), "data"), AmedSettings(), (16,))
    assert "amed: the denoiser taps no module" in caplog.text
    assert not learner.policy.needs_features


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["method"] == "dlms"])
def test_dlms_presets_are_valid(name: str) -> None:
    settings = preset(name)
    settings.pop("method")
    settings.pop("trajectories")
    nested = {"teacher": TeacherSettings}
    own, shared = split_settings(settings, DlmsSettings, TrainerSettings, nested=nested)
    assert settings.get("order") in (None, DlmsSettings(**own).resolved_order)
    TrainerSettings(**shared)


def build(settings: dict[str, Any]) -> None:
    """What a run makes of a preset's settings before its first step."""
    settings = {k: v for k, v in settings.items() if k not in ("method", "trajectories")}
    own, shared = split_settings(settings, AmedSettings, TrainerSettings)
    made = AmedSettings(nfe=own.pop("nfe", 5), **own)
    made.teacher_table(EDM(), made.grids(EDM())[1])
    TrainerSettings(**shared)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["method"] == "amed"])
def test_presets_are_valid(name: str) -> None:
    build(preset(name))


@pytest.mark.parametrize(
    "fault",
    [
        {"scale_tme": 0.2},
        {"teacher": "hen"},
        {"solver": "heun2"},
        {"grid": "quadratic"},
        {"batch": 0},
    ],
)
def test_a_wrong_preset_is_seen(fault: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(fault))):
        build({**preset("amed-cifar10"), **fault})
