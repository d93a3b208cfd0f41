"""LD3: soft forcing, loop, resume, settings, composition."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from ld3_cases import float_problem, make_loop, tiny
from safetensors.torch import load_file
from torch import Tensor

from dlms_engine.engine.adjoint import walk
from dlms_engine.learners import distill
from dlms_engine.learners.ld3.loop import Ld3Loop
from dlms_engine.learners.ld3.objective import Ld3
from dlms_engine.learners.ld3.pairs import project
from dlms_engine.learners.ld3.settings import Ld3Settings
from dlms_engine.learners.registry import preset
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM
from dlms_engine.support.parallel import World


def test_projection() -> None:
    centre = torch.zeros(2, 3, dtype=torch.float64)
    noise = torch.tensor([[3.0, 0.0, 4.0], [0.1, 0.0, 0.0]], dtype=torch.float64)
    inside = project(noise, centre, 1.0)
    assert torch.allclose(inside[0], torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64), atol=1e-15)
    assert torch.equal(inside[1], noise[1])
    assert torch.equal(project(noise, centre, 0.0), centre)


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
    assert loop.state.lr == pytest.approx(0.8 * lr) and loop.state.lr_times == 1 / 4
    loop.state.round = 1  # second phase: the network times' rate decays too, down to its floor
    for _ in range(2):
        loop._judge(math.inf)
    assert loop.state.lr_times == pytest.approx(0.8 / 4)
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
    with pytest.raises(ValueError, match="another run"):
        other.run(resume=True, progress=False)


def test_two_ranks_agree_with_one_process(tmp_path: Path) -> None:
    """Mini-batches shared by two ranks: the grid, the moved noises and the checkpoint agree."""
    whole = make_loop(batch=3)
    whole.run(progress=False)
    barrier, slots = threading.Barrier(2), [torch.zeros(0), torch.zeros(0)]

    class Half(World):
        def sum_(self, value: Tensor) -> Tensor:
            slots[self.rank] = value.clone()
            barrier.wait()
            value.copy_(slots[0] + slots[1])
            barrier.wait()
            return value

    loops: dict[int, Ld3Loop] = {}
    path = tmp_path / "ranks.checkpoint.safetensors"

    def work(rank: int) -> None:
        learner = Ld3(float_problem(), Ld3Settings(nfe=4, **tiny(batch=3)))
        loops[rank] = Ld3Loop(learner, (16,), seed=1, world=Half(rank, 2), checkpoint=path)
        loops[rank].run(progress=False)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = (loops[rank].learner.module.logits.detach() for rank in range(2))
    assert torch.equal(one, two)
    expected = whole.learner.module.logits.detach()
    assert float((one - expected).abs().max()) < 1e-5
    assert float((expected - make_loop().learner.module.logits.detach()).abs().max()) > 1e-2
    saved = load_file(path)["noise/train"]
    assert float((saved - whole.pairs["train"].noise).abs().max()) < 1e-5
    # the fault: a rank's own noises alone are stale where the other rank moved them
    assert float((loops[0].pairs["train"].noise - saved).abs().max()) > 1e-4


def test_network_times_have_a_rate_at_which_they_learn() -> None:
    """At the published 0.1 / N they stay within a hundredth of the grid on losses other than LPIPS."""
    loop = make_loop()
    assert loop.state.lr_times == 1 / loop.settings.steps
    assert Ld3Settings().rounds_times == 15
    published = preset("ld3-cifar10")
    assert (published["lr_times_share"], published["rounds_times"]) == (0.1, 5)
