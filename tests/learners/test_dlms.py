"""DLMS: starts as its initial solver, has the gradients of Algorithm 1, improves, resumes exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from mixture_network import EDM, Network, mixture_denoiser
from torch import Tensor, nn

from dlms_engine import grids, processes, solvers
from dlms_engine.engine.sampler import Sampler, seeded_noise
from dlms_engine.learners import distill
from dlms_engine.learners.dlms.initial import initial_weights
from dlms_engine.learners.dlms.objective import Dlms, endpoint_loss, student_end
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.dlms.teacher import Teacher, TeacherSettings
from dlms_engine.learners.training.ema import EmaSets
from dlms_engine.learners.training.noise import unit_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import load_solver
from dlms_engine.policies.dlms import step_coefficients


def learner(**changes) -> Dlms:
    settings = {"nfe": 4, "validation_samples": 16, "validation_steps": 32} | changes
    made = Dlms(mixture_denoiser(), DlmsSettings(**settings), (16,))
    made.module.to(torch.float64)
    return made


NOISE = unit_noise(0, range(6), (16,)).double()


@pytest.mark.parametrize(
    ("settings", "maker"),
    [
        ({"init": "ddim"}, lambda g, afs: solvers.ddim(EDM, g, afs=afs)),
        ({"init": "dpm_solver_pp"}, lambda g, afs: solvers.dpm_solver_pp(EDM, g, order=3, afs=afs)),
        (
            {"init": "ipndm", "prediction": "noise"},
            lambda g, afs: solvers.ipndm(EDM, g, order=4, afs=afs),
        ),
        (
            {"init": "deis", "prediction": "noise"},
            lambda g, afs: solvers.deis(EDM, g, order=4, afs=afs),
        ),
        ({"init": "unipc"}, lambda g, afs: solvers.unipc(EDM, g, order=3, afs=afs)),
        ({"init": "unipc", "order": 3}, lambda g, afs: solvers.unipc(EDM, g, order=2, afs=afs)),
    ],
    ids=["ddim", "dpm_solver_pp", "ipndm", "deis", "unipc", "unipc2"],
)
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("grid", ["time_uniform", "polynomial"])
def test_untrained_it_is_the_solver_it_starts_from(settings, maker, afs, grid):
    made = learner(afs=afs, grid=grid, **settings)
    table = maker(made.module.grid, "zero" if afs else False)
    assert table.nfe == made.policy.nfe == 4
    x = 80.0 * NOISE
    got = Sampler(made.denoiser, made.policy, dtype=torch.float64)(x)
    expected = Sampler(made.denoiser, table, dtype=torch.float64)(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["unipc", "deis"])
@pytest.mark.parametrize(
    "process",
    [processes.VP(), processes.RectifiedFlow(t_max=0.999), processes.RectifiedFlow()],
    ids=["vp", "flow", "flow-from-1"],
)
def test_solvers_over_the_whole_history_are_exact_off_edm(process, init):
    """DLMS's Eq. 8 covers them where a row may read every output that theirs does."""
    prediction = "data" if init == "unipc" else "noise"
    settings = DlmsSettings(nfe=5, afs=False, init=init, prediction=prediction, order=4)
    grid = grids.time_uniform(process, 5)
    if init == "deis" and float(process.alpha(grid[0])) == 0:
        with pytest.raises(ValueError, match="alpha"):
            initial_weights(process, grid, settings)
        return
    weights = initial_weights(process, grid, settings)
    table = getattr(solvers, init)(process, grid, order=3 if init == "unipc" else 4)
    _, gain = step_coefficients(process, prediction, grid[:-1], grid[1:])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(weights[:, : table.depth] * gain[:, None], table.b)


def test_the_designer_has_about_nine_thousand_parameters():
    made = learner(nfe=4)
    assert 9_000 <= sum(p.numel() for p in made.module.parameters()) <= 9_300


def randomise(made: Dlms, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (made.module.bias, made.module.head.weight):
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=size)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("afs", [False, True])
def test_training_follows_the_same_states_as_sampling(prediction, afs):
    """The values of the two-step re-prediction are those of Algorithm 2: no extra network call."""
    made = learner(prediction=prediction, afs=afs)
    randomise(made)
    states: list[Tensor] = []
    original = made._pair

    def spy(n, carry, teacher):
        loss, kept = original(n, carry, teacher)
        states.append(kept.x)
        return loss, kept

    made._pair = spy
    made.denoiser.network.mixture.calls = 0
    for _ in made.iteration(NOISE):
        pass
    steps, per_segment = made.settings.steps, made.settings.teacher.interpolation + 1
    student = steps - int(afs)
    assert made.denoiser.network.mixture.calls == student + steps * per_segment
    sampler = Sampler(made.denoiser, made.policy, dtype=torch.float64)
    _, trajectory = sampler(80.0 * NOISE, return_trajectory=True)
    if afs:  # the sampler's first row already starts at x_1 and gives x_2
        pairs = zip(trajectory[1:-1], states[1:], strict=True)
    else:
        pairs = zip(trajectory[1:-1], states, strict=True)
    for sampled, trained in pairs:
        torch.testing.assert_close(sampled, trained, rtol=0, atol=1e-8)


def test_gradients_equal_central_differences_of_the_stopped_objective():
    """d(sum of L_n)/d(bias) by differences, with every stopped quantity held at its value.

    L_n depends on the parameters through steps n-1 and n only; the rest is frozen by replaying the
    recorded carries, times t_n and targets.
    """
    made = learner(nfe=4, afs=True)
    randomise(made)
    frozen: list[tuple] = []
    original = made._pair

    def record(n, carry, teacher):
        loss, kept = original(n, carry, teacher)
        frozen.append((n, carry))
        return loss, kept

    made._pair = record
    made.module.zero_grad()
    for _ in made.iteration(NOISE):
        pass
    analytic = made.module.bias.grad.clone()
    with torch.no_grad():
        held = [hold(made, n, carry) for n, carry in frozen]

    def total() -> float:
        with torch.no_grad():
            return sum(float(stopped_loss(made, *h)) for h in held)

    for index in [(1, 0), (1, -2), (1, -1), (2, 1), (3, -2), (4, 0)]:
        with torch.no_grad():
            step = 1e-6
            made.module.bias[index] += step
            up = total()
            made.module.bias[index] -= 2 * step
            down = total()
            made.module.bias[index] += step
        numeric = (up - down) / (2 * step)
        assert math.isclose(numeric, float(analytic[index]), rel_tol=1e-4, abs_tol=1e-5), index


def hold(made: Dlms, n: int, carry):
    """(n, carry, t_{n-1}, t_n, features, target) at the recorded parameters."""
    before = made.module(carry.features, carry.t, n - 1)
    x1 = made.advance(carry.x, carry.t, before.time, before.weights, carry.queue)
    made.predict(x1, before.network_time)
    features = made.features()
    after = made.module(features, before.time, n)
    return n, carry, before.time, after.time, features, teacher_trail(made)[n - 1]


def teacher_trail(made: Dlms) -> list[Tensor]:
    """The teacher's states at t_1 .. t_N on the student's own times."""
    trail: list[Tensor] = []
    original = Teacher.advance

    def spy(self, t, t_next):
        out = original(self, t, t_next)
        trail.append(out)
        return out

    kept = made._pair
    made._pair = type(made)._pair.__get__(made)
    Teacher.advance = spy
    try:
        with torch.enable_grad():
            for _ in made.iteration(NOISE):
                pass
    finally:
        Teacher.advance = original
        made._pair = kept
    return trail


def stopped_loss(made: Dlms, n, carry, t1, t2, features, target) -> Tensor:
    before = made.module(carry.features, carry.t, n - 1)
    x1 = made.advance(carry.x, carry.t, before.time, before.weights, carry.queue)
    output = made.predict(x1, before.network_time)
    queue = [output, *carry.queue][: made.settings.resolved_order]
    after = made.module(features, t1, n)  # features and t_{n-1} are data for the second call
    x2 = made.advance(x1, before.time, t2, after.weights, queue)
    return (x2 - target).square().flatten(1).sum(1).mean()


def test_who_is_trained_by_what():
    """t_N, s_N and the first weights (one number that must be 1) get no gradient."""
    made = learner(nfe=4, afs=True)
    for _ in made.iteration(NOISE):
        pass
    grad = made.module.bias.grad
    assert grad[-1, -2:].abs().max() == 0  # t_N, s_N
    assert grad[0, :-2].abs().max() == 0  # a^(1)
    assert (grad[:-1, -2].abs() > 0).all()  # every t_1 .. t_{N-1}
    assert (grad[:-1, -1].abs() > 0).all()
    assert (grad[1:, 0].abs() > 0).all()


ABLATIONS = [
    {"afs": False},
    {"bottleneck": False},
    {"init": "ddim"},
    {"last_step": "pixels"},
    {"time_scaling": False},
    {"adaptive_times": False},
]


@pytest.mark.parametrize("change", ABLATIONS, ids=lambda c: next(iter(c)))
def test_each_ablation_is_one_switch(change):
    made = learner(**change)
    for numbers in made.iteration(NOISE):
        assert all(math.isfinite(v) for v in numbers.values())
    grad = made.module.bias.grad
    if "adaptive_times" in change:
        assert grad[:, -2].abs().max() == 0
    if "time_scaling" in change:
        assert grad[:, -1].abs().max() == 0
    if "bottleneck" in change:
        assert made.module.settings.features == 0


def train(tmp_path, name, *, trajectories=640, resume=False, **settings):
    return distill(
        mixture_denoiser(),
        "dlms",
        nfe=4,
        shape=(16,),
        trajectories=trajectories,
        batch=32,
        validation_samples=32,
        validation_steps=48,
        validate_every=5,
        progress=False,
        output=tmp_path / name,
        resume=resume,
        grid="polynomial",
        **settings,
    )


def endpoint_rmse(solver) -> float:
    denoiser = mixture_denoiser()
    noise = seeded_noise(range(100), (16,), 80.0)
    exact = Sampler(denoiser, solvers.dpm_solver_pp(EDM, grids.polynomial(EDM, 200), order=3))(
        noise
    )
    return float((Sampler(denoiser, solver)(noise) - exact).square().mean().sqrt())


def test_distillation_beats_where_it_started_and_the_file_is_the_solver(tmp_path):
    settings = {"prediction": "noise", "init": "ipndm", "time_range": 0.4}
    solver = train(tmp_path, "solver.safetensors", **settings)
    start = solvers.ipndm(EDM, grids.polynomial(EDM, 5), order=4, afs="zero")
    assert endpoint_rmse(solver) < 0.8 * endpoint_rmse(start)
    loaded = load_solver(tmp_path / "solver.safetensors")
    x = seeded_noise(range(3), (16,), 80.0)
    denoiser = mixture_denoiser()
    assert torch.equal(Sampler(denoiser, loaded)(x), Sampler(denoiser, solver)(x))
    assert loaded.nfe == 4
    assert loaded.settings["time_range"] == 0.4
    table = solver.table(denoiser, x)
    assert table.nfe == 4
    assert torch.allclose(table.grid[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert endpoint_rmse(table) < endpoint_rmse(start)


def test_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    whole = train(tmp_path, "whole.safetensors", trajectories=320)
    original = Dlms.iteration
    calls = 0

    def killed(self, noise):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        yield from original(self, noise)

    monkeypatch.setattr(Dlms, "iteration", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "resumed.safetensors", trajectories=320)
    monkeypatch.setattr(Dlms, "iteration", original)
    assert (tmp_path / "resumed.checkpoint.safetensors").exists()
    resumed = train(tmp_path, "resumed.safetensors", trajectories=320, resume=True)
    for (name, a), (_, b) in zip(
        whole.policy.designer.state_dict().items(),
        resumed.policy.designer.state_dict().items(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert resumed.history == whole.history
    assert not (tmp_path / "resumed.checkpoint.safetensors").exists()


def test_another_seed_is_seen_by_that_comparison(tmp_path):
    first = train(tmp_path, "a.safetensors", trajectories=64)
    other = train(tmp_path, "b.safetensors", trajectories=96)
    assert not torch.equal(first.policy.designer.bias, other.policy.designer.bias) or (
        first.history != other.history
    )


def test_resume_refuses_a_checkpoint_of_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Dlms, "iteration", lambda self, noise: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "x.safetensors")
    with pytest.raises(ValueError, match=r"time_range: 0.7 -> 0.2"):
        train(tmp_path, "x.safetensors", resume=True, time_range=0.2)


def test_memory_does_not_grow_with_the_number_of_evaluations():
    """The largest graph of one iteration holds one network evaluation, whatever N is."""

    def saved(nfe: int) -> int:
        made = learner(nfe=nfe, teacher=TeacherSettings(interpolation=0, order=1))
        alive = peak = 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, peak
                self.tensor, self.size = tensor, tensor.numel()
                alive += self.size
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            for _ in made.iteration(NOISE):
                pass
        return peak

    assert saved(9) <= 1.2 * saved(5)


def test_the_endpoint_phase_sees_what_sampling_gives_and_trains_everything():
    made = learner(nfe=4, endpoint_share=1.0)
    randomise(made)
    made.progress = 0.5
    x = 80.0 * NOISE
    end = student_end(made, x)
    sampled = Sampler(made.denoiser, made.policy, dtype=torch.float64)(x)
    torch.testing.assert_close(end, sampled, rtol=0, atol=1e-8)
    for numbers in made.iteration(NOISE):
        assert math.isfinite(numbers["endpoint"])
    grad = made.module.bias.grad
    assert (grad[:-1, -2].abs() > 0).all()
    for index in [(0, -2), (2, 1), (3, 0)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                made.module.bias[index] += sign * 1e-6
                values.append(float(endpoint_loss(made, x)))
                made.module.bias[index] -= sign * 1e-6
        numeric = (values[0] - values[1]) / 2e-6
        # the features are data for the designer: differences see them move, gradients do not
        assert math.isclose(numeric, float(grad[index]), rel_tol=0.2, abs_tol=0.02), index


def test_unknown_settings_are_named_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'learning_rate'.*\blr\b"):
        distill(mixture_denoiser(), "dlms", nfe=4, shape=(16,), learning_rate=0.1)


def test_teacher_with_history_is_more_accurate_than_without():
    """Without interpolation points and history the teacher is DDIM; with history it is 2M."""
    denoiser = mixture_denoiser()
    grid = grids.logsnr(EDM, 16)
    x = 80.0 * NOISE
    exact = Sampler(
        denoiser,
        solvers.dpm_solver_pp(EDM, grids.polynomial(EDM, 400), order=3),
        dtype=torch.float64,
    )(x)
    errors = {}
    for keep in (True, False):
        teacher = Teacher(denoiser, TeacherSettings(0, 3, keep), x, 16, {})
        for t, t_next in itertools.pairwise(grid):
            teacher.advance(t.expand(6), t_next.expand(6))
        errors[keep] = float((teacher.x - exact).square().mean().sqrt())
    assert errors[True] < 0.5 * errors[False]


def test_teacher_on_the_whole_grid_is_the_handcrafted_solver():
    denoiser = mixture_denoiser()
    grid = grids.logsnr(EDM, 4)
    teacher = Teacher(denoiser, TeacherSettings(2, 3), 80.0 * NOISE, 4, {})
    for t, t_next in itertools.pairwise(grid):
        teacher.advance(t.expand(6), t_next.expand(6))
    table = solvers.dpm_solver_pp(EDM, grids.logsnr(EDM, 12), order=3)
    expected = Sampler(denoiser, table, dtype=torch.float64)(80.0 * NOISE)
    torch.testing.assert_close(teacher.x, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "process", [EDM, processes.VP(), processes.RectifiedFlow()], ids=lambda p: p.name
)
def test_the_step_is_exact_for_a_constant_prediction(process):
    t = torch.tensor([process.t_max], dtype=torch.float64)
    t_next = torch.tensor([0.5 * (process.t_max + process.t_min)], dtype=torch.float64)
    data = torch.tensor([0.7], dtype=torch.float64)
    noise = torch.tensor([-1.3], dtype=torch.float64)
    x = process.alpha(t) * data + process.sigma(t) * noise
    expected = process.alpha(t_next) * data + process.sigma(t_next) * noise
    a, c = step_coefficients(process, "data", t, t_next)
    torch.testing.assert_close(a * x + c * data, expected)


def test_ema_has_the_half_life_it_claims():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    ema = EmaSets(module, (1.0,))
    ema.update(module, 10**9)  # forgets everything before: the average is 1
    nn.init.zeros_(module.weight)
    for _ in range(10):
        ema.update(module, 100)  # 1000 trajectories: one half-life
    assert math.isclose(float(ema.sets()["ema1"]["weight"]), 0.5, rel_tol=1e-6)


def test_settings_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="noise"):
        DlmsSettings(init="ipndm")
    with pytest.raises(ValueError, match="init='unipc' is exact in data form only"):
        DlmsSettings(init="unipc", prediction="noise")
    with pytest.raises(ValueError, match="order is 1: its corrector reads two outputs"):
        DlmsSettings(init="unipc", order=1)
    with pytest.raises(ValueError, match="nfe is 0"):
        DlmsSettings(nfe=0)
    assert dataclasses.replace(DlmsSettings(), nfe=7).steps == 8


def test_without_a_tap_every_sample_gets_the_same_rows(caplog):
    """It was an error, and so was a bottleneck that is not 8x8."""
    caplog.set_level("INFO", logger="dlms_engine")
    learner = Dlms(Denoiser(Network(), EDM, "data"), DlmsSettings(), (16,))
    assert learner.module.settings.features == 0 and "taps no module" in caplog.text
    network = Network()
    network.narrow = torch.nn.Identity()

    def cut(_module, _inputs, output):
        network.narrow(output[:, :, :3, :5])

    network.tap.register_forward_hook(cut)
    learner = Dlms(Denoiser(network, EDM, "data", features="narrow"), DlmsSettings(), (16,))
    assert learner.module.settings.features == 15
