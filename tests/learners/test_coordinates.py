"""AMED and DLMS off EDM: in the papers' coordinates a VP model is the model written as EDM's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import GaussianMixture
from torch import Tensor, nn

from dlms_engine import grids
from dlms_engine.engine.export import trace_sampler
from dlms_engine.engine.sampler import Sampler
from dlms_engine.integrations.k_diffusion import sample_dlms, solver_sigmas
from dlms_engine.learners.amed.objective import Amed
from dlms_engine.learners.amed.settings import AmedSettings
from dlms_engine.learners.dlms.objective import Dlms
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.training import validation
from dlms_engine.learners.training.coordinates import Coordinates
from dlms_engine.learners.training.noise import unit_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.coordinates import EdmCoordinates
from dlms_engine.policies.distilled import load_solver, save_solver
from dlms_engine.policies.static_table import average_table
from dlms_engine.processes import VP, Cosine, Process, RectifiedFlow, VPDiscrete, edm_coordinates

PROCESSES: dict[str, Process] = {
    "vp": VP(),
    "discrete": VPDiscrete(betas=torch.linspace(1e-4, 2e-2, 1000).tolist()),
    "cosine": Cosine(),
}
METHODS: dict[str, dict[str, Any]] = {
    "amed": {"solver": "ipndm", "scale_time": 0.2, "scale_dir": 0.1, "interpolation": 1},
    "dlms": {"prediction": "noise", "order": 3, "afs": True},
}


class Network(nn.Module):
    """The mixture's posterior mean on ``process``; ``edm``: of x / alpha and its level."""

    def __init__(self, process: Process, edm: bool) -> None:
        super().__init__()
        self.process, self.edm = process, edm
        self.mixture = GaussianMixture(process)
        self.tap = nn.Identity()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        if self.edm:
            t = self.process.inverse_sigma(t)
            x = self.process.alpha(t)[:, None] * x
        self.tap(torch.sin(torch.cat([x] * 4, dim=1)).reshape(-1, 1, 8, 8))
        return self.mixture(x, t) * self.scale


def model(process: Process, edm: bool = False) -> Denoiser:
    on = edm_coordinates(process) if edm else process
    return Denoiser(Network(process, edm), on, "data", features="tap").requires_grad_(False)


def learned(method: str, denoiser: Denoiser, **changes: Any) -> Any:
    """The policy after three batches of the paper's algorithm."""
    settings = {**METHODS[method], "endpoint_share": 0.0, **changes}
    settings["grid"] = grids.polynomial(denoiser.process, 5 if method == "dlms" else 2)
    learner: Any
    if method == "amed":
        learner = Amed(denoiser, AmedSettings(nfe=4, **settings), (16,))
    else:
        learner = Dlms(denoiser, DlmsSettings(nfe=4, **settings), (16,))
    learner.module.double()
    optimiser = torch.optim.SGD(learner.module.parameters(), lr=1e-3)
    for k in range(3):
        for _ in learner.iteration(unit_noise(0, range(16 * k, 16 * k + 16), (16,)).double()):
            nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return learner.policy


def samples(denoiser: Denoiser, solver: Any) -> Tensor:
    """x / alpha at the end."""
    process = denoiser.process
    noise = process.sigma(process.t_max) * unit_noise(5, range(6), (16,)).double()
    end = Sampler(denoiser, solver, dtype=torch.float64)(noise)
    return end / process.alpha(process.t_min)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_and_the_same_model_written_as_edms_learn_one_solver(
    method: str, name: str, tmp_path: Path
) -> None:
    process = PROCESSES[name]
    own, written = model(process), model(process, edm=True)
    ours, theirs = learned(method, own), learned(method, written)
    assert isinstance(ours, EdmCoordinates)
    noise = process.sigma(process.t_max) * unit_noise(5, range(8), (16,))
    level = process.sigma_over_alpha(process.t_max) * unit_noise(5, range(8), (16,))
    table, other = average_table(ours, own, noise), average_table(theirs, written, level)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(process.sigma_over_alpha(table.times), other.times, **close)
    torch.testing.assert_close(process.sigma_over_alpha(table.grid), other.grid, **close)
    alpha = process.alpha(torch.cat([table.times, table.grid[-1:]]))
    torch.testing.assert_close(table.a * alpha[:-1] / alpha[1:], other.a, **close)
    torch.testing.assert_close(table.b / alpha[1:, None], other.b, **close)
    torch.testing.assert_close(samples(own, ours), samples(written, theirs), **close)
    torch.testing.assert_close(samples(own, table), samples(written, other), **close)
    again = load_solver(save_solver(tmp_path / "solver.safetensors", ours))
    # a file keeps a designer in single precision
    torch.testing.assert_close(samples(own, again), samples(own, ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_input_that_is_not_rescaled_is_another_solver(method: str) -> None:
    """The planted fault: the network is told a scaled level, its input stays."""
    process = PROCESSES["vp"]
    own = model(process)
    plain = learned(method, own, coordinates="process")
    assert not isinstance(plain, EdmCoordinates)
    written = model(process, edm=True)
    found, wanted = samples(own, plain), samples(written, learned(method, written))
    assert (found - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_running_rows_gives_the_same_samples(method: str) -> None:
    process = PROCESSES["vp"]
    own = model(process).double()
    solver = learned(method, own)
    noise = process.sigma(process.t_max) * unit_noise(5, range(3), (16,)).double()
    sampler = Sampler(own, solver, dtype=torch.float64)
    native = sampler(noise)
    eager = Sampler(own, solver, dtype=torch.float64, backend="eager")
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(eager(noise), native, **close)
    thresholded = copy.copy(own)
    thresholded.dynamic_thresholding = 1.0
    assert Sampler(thresholded, solver, dtype=torch.float64)(noise).isfinite().all()
    # k-diffusion's denoisers take x / alpha at its level, which is what these rows are made of
    table = average_table(solver, own, noise)
    written = model(process, edm=True)
    sigmas = solver_sigmas(table)
    start = noise / process.alpha(process.t_max)
    end = sample_dlms(lambda x, s, **_: written(x, s), start, sigmas, solver=table, disable=True)
    wanted = Sampler(own, table, dtype=torch.float64)(noise) / process.alpha(process.t_min)
    torch.testing.assert_close(end, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_exported_and_compiled_programs_rescale_the_input(method: str) -> None:
    process = PROCESSES["vp"]
    own = model(process)
    sampler = Sampler(own, learned(method, own), dtype=torch.float64)
    noise = process.sigma(process.t_max) * unit_noise(5, range(3), (16,)).double()
    wanted = sampler(noise)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(trace_sampler(sampler, noise).module()(noise), wanted, **close)
    compiled = torch.compile(sampler, backend="aot_eager")
    torch.testing.assert_close(compiled(noise), wanted, **close)


def test_flows_keep_their_own_time_unless_their_level_is_finite() -> None:
    whole, short = (model(RectifiedFlow(t_max=t)) for t in (1.0, 0.999))
    assert Coordinates.of(whole, None).denoiser is whole
    assert Coordinates.of(short, None).denoiser is short
    with pytest.raises(ValueError, match=r"inf at t = 1.0 .*coordinates='process'"):
        Coordinates.of(whole, "edm")
    view = Coordinates.of(short, "edm").denoiser
    x = torch.randn(4, 16, dtype=torch.float64)
    # at level 3 of a flow t is 3/4 and alpha 1/4
    torch.testing.assert_close(view(x, 3.0), short(x / 4, 0.75))


@pytest.mark.parametrize("process", [VP(), RectifiedFlow()])
def test_updates_share_one_exact_solver(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: every update of an endpoint phase made the same table again, 20 ms of the host."""
    denoiser = Denoiser(GaussianMixture(process), process, "data")
    made: list[int] = []
    real = validation.accurate_table

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(validation, "accurate_table", counted)
    coordinates = Coordinates.of(denoiser, "process")
    starts = [float(process.sigma(process.t_max)) * unit_noise(n, range(2), (16,)) for n in (0, 1)]
    found = [coordinates.exact_solution(x, 8, {}) for x in starts]
    assert len(made) == 1
    for x, end in zip(starts, found, strict=True):
        assert torch.equal(end, validation.exact_solution(denoiser, x, 8))
