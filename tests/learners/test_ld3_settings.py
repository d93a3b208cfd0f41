"""LD3: refused settings, losses, composition with other learners."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ld3_cases import float_problem, make_loop, mixture, tiny
from torch import Tensor

from dlms_engine import grids
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.ld3.grid import LearnedGrid
from dlms_engine.learners.training.start_times import refine, start_times
from dlms_engine.processes import EDM, RectifiedFlow


def test_bad_settings_are_refused() -> None:
    denoiser = float_problem()
    for bad, words in (
        ({"studnet": "unipc"}, "unknown setting 'studnet'"),
        ({"student": "heun"}, "student is 'heun'"),
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
    with pytest.raises(ValueError, match="expected 6 \\(5 steps\\)"):
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
