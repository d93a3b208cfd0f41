"""LD3: parameterisation against the reference, gradients, soft forcing, loop, resume."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from dlms_engine import grids, solvers
from dlms_engine.denoiser import Denoiser
from dlms_engine.learners import distill
from dlms_engine.learners.adjoint import solve, walk
from dlms_engine.learners.base_table import Base
from dlms_engine.learners.grid_tools import refine, start_times
from dlms_engine.learners.ld3 import Ld3, Ld3Settings
from dlms_engine.learners.ld3_data import project
from dlms_engine.learners.ld3_grid import (
    LearnedGrid,
    decoupled_times,
    grid_logits,
    natural_coordinate,
    softmax_grid,
)
from dlms_engine.learners.ld3_loop import Ld3Loop
from dlms_engine.learners.sample_loss import sample_loss
from dlms_engine.processes import EDM, VP, RectifiedFlow
from dlms_engine.rollout import rollout
from dlms_engine.sampler import Sampler
from torch import Tensor, nn

DATA = Path(__file__).parents[1] / "data"
CASES = ["lambda-init-N6", "lambda-rand-N6", "time-init-N6", "time-rand-N6"]
STUDENTS = {
    "uni_pc-bh1-f64-o2": Base("unipc", 2, "bh1"),
    "uni_pc-bh2-f64-o2": Base("unipc", 2, "bh2"),
    "uni_pc-bh1-f64-o3": Base("unipc", 3, "bh1"),
    "uni_pc-bh2-f64-o3": Base("unipc", 3, "bh2"),
    "dpm_solverpp-o2": Base("dpm_solver_pp", 2),
    "dpm_solverpp-o3": Base("dpm_solver_pp", 3),
    "ipndm-o2": Base("ipndm", 2),
    "ipndm-o3": Base("ipndm", 3),
    "ipndm-o4": Base("ipndm", 4),
    "euler": Base("euler"),
}


def mixture(process: Any = None) -> tuple[GaussianMixture, Denoiser]:
    """The analytic problem behind the interface of a network."""
    process = process or EDM()
    network = GaussianMixture(process)
    return network, Denoiser(network, process, "data")


def reference(case: str) -> dict[str, Tensor]:
    with np.load(DATA / "ld3_parameterisation.npz") as file:
        return {
            k.split("/")[1]: torch.from_numpy(file[k])
            for k in file.files
            if k.startswith(case + "/")
        }


def start_noise() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(8, 16)))


# -- parameterisation --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parameterisation_equals_the_reference(case: str) -> None:
    """t, tc and their VJPs (cotangent 1, 2, .., 7), with the official bound of the offsets."""
    ref, process = reference(case), EDM()
    coordinate: Any = case.split("-")[0]
    xi = ref["xi"].clone().requires_grad_()
    xi_c = ref["xi_c"].clone().requires_grad_()
    ends = torch.tensor([80.0, 0.002], dtype=torch.float64)
    t = softmax_grid(process, xi[1:], coordinate, ends[0], ends[1])
    official = 0.5 * float(ref["xi"].diff().abs().min()) if coordinate == "lambda" else None
    tc = decoupled_times(process, t, xi_c[1:-1], coordinate, limit=official)
    weight = torch.arange(1, 8, dtype=torch.float64)
    grads = torch.autograd.grad(t @ weight, xi, retain_graph=True)
    grads += torch.autograd.grad(tc @ weight, (xi, xi_c))
    found = dict(
        zip(("t", "tc", "vjp_t_xi", "vjp_tc_xi", "vjp_tc_xic"), (t, tc, *grads), strict=True)
    )
    for name, value in found.items():
        value = value.detach()
        worst = float(((value - ref[name]).abs() / ref[name].abs().clamp_min(1)).max())
        assert worst < 1e-10, f"{name}: {worst:.2e}"
    assert t[0] == 80.0 and t[-1] == 0.002, "the ends are exact"


def test_the_clamp_is_the_only_difference() -> None:
    """With the bound from lambda_'s gaps only the entry the official code clamps differs."""
    ref, process = reference("lambda-rand-N6"), EDM()
    tc = decoupled_times(process, ref["t"], ref["xi_c"][1:-1], "lambda")
    differs = ((tc - ref["tc"]).abs() / ref["tc"] > 1e-10).nonzero().flatten().tolist()
    assert differs == [4]
    unclamped = process.inverse_lambda(process.lambda_(ref["t"][4]) + ref["xi_c"][4])
    assert abs(float(tc[4] - unclamped)) < 1e-12


@pytest.mark.parametrize("coordinate", ["lambda", "time"])
def test_any_grid_is_representable(coordinate: Any) -> None:
    process = VP()
    grid = grids.polynomial(process, 6)
    logits = grid_logits(process, grid, coordinate)
    back = softmax_grid(process, logits, coordinate, grid[0], grid[-1])
    assert float((back - grid).abs().max()) < 1e-13
    assert back[0] == grid[0] and back[-1] == grid[-1]


@pytest.mark.parametrize("seed", range(5))
def test_steps_are_positive_and_offsets_bounded(seed: int) -> None:
    """Extreme logits keep the order; offsets never reach a neighbour's window."""
    torch.manual_seed(seed)
    module = LearnedGrid(EDM(), grids.polynomial(EDM(), 7))
    with torch.no_grad():
        module.logits.copy_(4 * torch.randn(7))
        module.offsets.copy_(100 * torch.randn(6))
    times = module()
    assert bool((times.grid.diff() < 0).all())
    # two neighbours may meet half way
    assert bool((times.network.log().diff() < 1e-9).all())
    lam, asked = EDM().lambda_(times.grid), EDM().lambda_(times.network)
    assert float((asked - lam).abs().max()) <= 0.5 * float(lam.diff().min()) + 1e-12


def test_flow_uses_time() -> None:
    process = RectifiedFlow()
    module = LearnedGrid(process, grids.time_uniform(process, 4))
    assert (
        module.coordinate == "time" == natural_coordinate(process, grids.time_uniform(process, 4))
    )
    with pytest.raises(ValueError, match="coordinate='time'"):
        LearnedGrid(process, grids.time_uniform(process, 4), coordinate="lambda")


# -- students and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
def test_student_with_decoupled_times_equals_the_reference(name: str) -> None:
    with np.load(DATA / "ld3.npz") as file:
        prefix = f"{name}-N5-edm-pert_interior/"
        ref = {
            k[len(prefix) :]: torch.from_numpy(file[k]) for k in file.files if k.startswith(prefix)
        }
    network, denoiser = mixture()
    t, tc = ref["t"].requires_grad_(), ref["tc"].requires_grad_()
    table = STUDENTS[name].table(denoiser.process, t, tc)
    end = solve(denoiser, table, 80.0 * start_noise())[-1]
    # the reference rounds UniPC's contraction to single precision
    bound = 2e-6 if name.startswith("uni_pc") else 1e-10
    assert float((end.detach() - ref["x_final"]).abs().max()) < bound
    assert network.calls == 5 == table.nfe


def test_unipc_time_gradient_is_exact() -> None:
    """Order 3, log-time gradient against central differences (the reference is 9-25 % off)."""
    _, denoiser = mixture()
    base, grid = Base("unipc", 3, "bh1"), grids.polynomial(EDM(), 5)

    def loss(log_t: Tensor) -> Tensor:
        t = torch.cat([grid[:1], log_t.exp(), grid[-1:]])
        return solve(denoiser, base.table(EDM(), t, t), 80.0 * start_noise())[-1].square().mean()

    at = grid[1:-1].log()
    leaf = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    with torch.no_grad():
        for i in range(len(at)):
            step = torch.zeros_like(at)
            step[i] = 1e-5
            central = float(loss(at + step) - loss(at - step)) / 2e-5
            assert abs(float(grad[i]) - central) < 1e-6 * float(grad.abs().max())


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_sweep_equals_autograd(batched: bool, prediction: str) -> None:
    """All gradients of the hand-written sweep, with losses on inner states too."""
    _, denoiser = mixture()
    grid = grids.polynomial(EDM(), 4)
    made = (
        solvers.dpm_solver_pp(EDM(), grid, order=3, afs=True)
        if prediction == "data"
        else solvers.ipndm(EDM(), grid, order=3)
    )
    x = 80.0 * start_noise()
    lead = (8,) if batched else ()
    names = ("a", "b", "times", "initial_scale", "grid", "t_start", "t_end")

    def gradients(own: bool) -> list[Tensor]:
        parts = {
            k: getattr(made, k).expand((*lead, *getattr(made, k).shape)).clone() for k in names
        }
        leaves = [parts[k].requires_grad_() for k in names[:4]]
        table, start = dataclasses.replace(made, **parts), x.clone().requires_grad_()
        if own:
            states = solve(denoiser, table, start)
            end, inner = states[-1], states[1]
        else:
            end, states, _ = rollout(denoiser, table, start)
            inner = states[1]
        loss = end.square().sum() + (0.01 * inner).sin().sum()
        return list(torch.autograd.grad(loss, [*leaves, start]))

    for name, left, right in zip((*names[:4], "x"), gradients(True), gradients(False), strict=True):
        scale = float(right.abs().max())
        assert scale > 0, name
        # a slot from before the first evaluation has no weight to learn
        assert float((left - right).abs().max()) < 1e-12 * scale, name


class Wide(nn.Module):
    """A network whose graph dwarfs a state; counts the graphs alive at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 4096).double(), nn.Linear(4096, 16).double()
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + t[:, None]))


def peak_bytes(run: Any) -> int:
    """Most bytes autograd keeps at once beyond small tensors."""
    alive, peak = 0, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal alive, peak
        size = tensor.numel() * tensor.element_size()
        if size >= 4096 * 8 and not isinstance(tensor, nn.Parameter) and tensor.shape[0] == 8:
            copy = tensor.clone()
            alive += size
            peak = max(peak, alive)

            def freed(size: int = size) -> None:
                nonlocal alive
                alive -= size

            weakref.finalize(copy, freed)
            return copy
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return peak


def test_memory_is_flat_in_nfe() -> None:
    """Network activations kept by the sweep: the same for 3 and 12 evaluations; autograd's grow."""
    denoiser = Denoiser(Wide(), EDM(), "data")

    def run(nfe: int, own: bool) -> int:
        grid = grids.polynomial(EDM(), nfe).requires_grad_()
        table = solvers.ipndm(EDM(), grid, order=3)

        def step() -> None:
            if own:
                end = solve(denoiser, table, 80.0 * start_noise())[-1]
            else:
                end = rollout(denoiser, table, 80.0 * start_noise())[0]
            end.square().sum().backward()

        return peak_bytes(step)

    assert run(3, True) == run(12, True) > 0
    assert run(12, False) >= 3.9 * run(3, False) > 0, "the fault: one graph per evaluation"


# -- soft forcing and loop --------------------------------------------------------------------------


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
    settings = {"train": 20, "validation": 10, "batch": 4, "rounds": 3, "rounds_times": 3,
                "loss": "l2", "radius": 0.01, "lr": 0.02, "student": student, "whole": True}  # fmt: skip
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
    print(student, float(before), float(after))
    assert float(after) < 0.5 * float(before), (float(before), float(after))
    assert table.name == "ld3" and table.options["solver"] == start.name
    assert float((table.times - table.grid[:-1]).abs().max()) > 0


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


def test_lpips_goes_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    class LPIPS(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            assert options["net"] == "vgg" and options["pretrained"] is False
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (self.weight * (a - b).square()).mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))  # type: ignore[arg-type]
    path = tmp_path / "lpips.safetensors"
    save_file({"weight": torch.full((1,), 3.0)}, path)
    loss = sample_loss("lpips", float_problem(), lpips_weights=str(path))
    a, b = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert torch.equal(loss(a, b), torch.full((2,), 3.0))
    save_file({"other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"weights of lpips\.LPIPS"):
        sample_loss("lpips", float_problem(), lpips_weights=str(path))


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
    assert float((module().network - times.network).abs().max() / 80) < 1e-12
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
