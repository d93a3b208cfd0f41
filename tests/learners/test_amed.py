"""AMED: reference trajectories and gradients, neutral plugins, the predictor."""

from __future__ import annotations

import dataclasses
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
    run,
    start_noise,
)
from torch import Tensor

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners.amed.objective import Amed
from dlms_engine.learners.amed.settings import AmedSettings
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase, Walk
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow

TOLERANCE = 1e-10
TRAINING = f"train_ipndm__both__poly7__N4__M2__{SUFFIX[-4:]}"


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
